"""Length prediction: baselines and errors along the answer against plain loops, and the command."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from lenvm.cli import main
from lenvm.evaluation.data import NaturalData, NaturalPrompt, Sample, read_natural
from lenvm.evaluation.length import Course, calibration_bins, finished_answers, length_outcome
from lenvm.evaluation.outcome import read_outcome
from lenvm.evaluation.prediction import leave_one_out_domain_mean, leave_one_out_regression, survival_mean
from lenvm.evaluation.schema import Estimate
from lenvm.evaluation.scoring import PromptPrediction
from lenvm.evaluation.values import StateValues


def test_regression_leaves_its_prompt_out():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 80, 12)
    truth = 3.0 * tokens**0.7 * rng.lognormal(0, 0.3, 12)
    found = leave_one_out_regression(truth, tokens)
    for i in range(12):
        rest = np.arange(12) != i
        slope, start = np.polyfit(np.log(tokens[rest]), np.log(truth[rest]), 1)
        assert found[i] == pytest.approx(np.exp(start + slope * np.log(tokens[i])))
    same = leave_one_out_regression([10.0, 20, 30, 40], [7, 7, 7, 7])
    assert same[0] == pytest.approx((20 * 30 * 40) ** (1 / 3))
    with pytest.raises(ValueError, match="at least 4 prompts, got 3"):
        leave_one_out_regression([1, 2, 3], [1, 2, 3])


def test_domain_mean_by_hand():
    assert leave_one_out_domain_mean([10, 20, 60, 1, 3], ["a", "a", "a", "b", "b"]).tolist() == [40, 35, 15, 3, 1]
    with pytest.raises(ValueError, match="'b' has one prompt"):
        leave_one_out_domain_mean([1, 2, 3], ["a", "a", "b"])


def test_survival_mean_by_hand():
    lengths = [[100], [2, 5], [5, 9]]
    # of 2, 5, 5, 9: longer than 0 all, longer than 2 three, longer than 5 one, longer than 9 none
    assert survival_mean(lengths, 0, [0, 2, 5, 9]).tolist() == pytest.approx([21 / 4, 19 / 3 - 2, 4, 1])


def known(length: int, bias: float = 1.0) -> StateValues:
    left = np.arange(length, -1, -1, dtype=np.float64)
    return StateValues(-(1 - 0.98**left), bias * left, p10=left, p50=left, p90=left)


def natural(lengths: list[list[int]]) -> NaturalData:
    prompts = tuple(
        NaturalPrompt(f"p{i}", [], (1,) * (i + 3), tuple(Sample("", (5,) * n, "stop") for n in row), None, "ab"[i % 2])
        for i, row in enumerate(lengths)
    )
    return NaturalData(prompts, {}, "made up")


def test_a_perfect_predictor_has_no_error_anywhere():
    lengths = [[10, 10], [20, 20], [40, 40], [80, 80]]
    truth = np.array([10.0, 20, 40, 80])
    predicted = PromptPrediction(truth, truth, truth, truth, truth, 0.98)
    data = natural(lengths)
    courses = [Course(i, data.prompts[i].samples[k].length, known(data.prompts[i].samples[k].length))
               for i, k in finished_answers(data.prompts, 1)]  # fmt: skip
    assert [c.length for c in courses] == [10, 20, 40, 80]
    outcome = length_outcome(data, predicted, courses, {})
    table = {str(r[0]): r[1:] for r in outcome.sheet("Table 3").rows}
    assert outcome.sheet("Table 3").head == ["", "all", "a", "b"]
    for cell in (*table["LenVM, value z (Eq. 5)"], *table["noise floor of the truth"]):
        assert isinstance(cell, Estimate)
        assert cell.value == pytest.approx(0.0, abs=1e-9)
    mean = table["mean of the other prompts"][0]
    assert isinstance(mean, Estimate)
    by_hand = np.mean([abs((150 - x) / 3 - x) / x for x in truth])
    assert mean.value == pytest.approx(100 * by_hand)
    for row in outcome.sheet("Error along").rows:
        assert isinstance(row[1], Estimate) and isinstance(row[5], Estimate)
        assert (row[1].value, row[5].value) == (0.0, 0.0)
    for row in outcome.sheet("Calibration").rows:
        assert row[3] == pytest.approx(0.0)
    for row in outcome.sheet("Coverage").rows:
        assert all(isinstance(c, Estimate) and c.value == 100.0 for c in row[1:])


def test_errors_of_a_biased_predictor_along_the_answer():
    data = natural([[10, 10], [20, 20], [40, 40], [80, 80]])
    predicted = PromptPrediction(*([np.array([10.0, 20, 40, 80])] * 5), 0.98)
    courses = [Course(i, n, known(n, 1.5)) for i, n in enumerate((10, 20, 40, 80))]
    rows = length_outcome(data, predicted, courses, {}).sheet("Error along").rows
    half = rows[3]
    assert half[0] == "50 %"
    assert isinstance(half[1], Estimate) and isinstance(half[2], Estimate) and isinstance(half[3], Estimate)
    assert half[1].value == pytest.approx(50.0)
    assert half[2].value == pytest.approx(np.mean([2.5, 5, 10, 20]))
    # others at t = 5, 10, 20, 40: means of the longer ones minus t
    others = [(140 / 3 - 5) / 5, (120 / 2 - 10) / 10, (80 - 20) / 20, 1 / 40]
    assert half[3].value == pytest.approx(100 * np.mean([abs(o - 1) for o in others]))


def test_calibration_bins_hold_every_state_once():
    courses = [Course(0, 7, known(7)), Course(1, 23, known(23, 2.0))]
    bins = calibration_bins(courses)
    assert sum(len(p) for p, _, _ in bins) == 30
    assert all(a[0].max() <= b[0].min() for a, b in itertools.pairwise(bins))


def test_the_command(world, tmp_path):
    out = tmp_path / "length"
    words = ["eval", "length", "--prompts", str(world.prompts), "--samples", str(world.samples), "--lenvm",
             str(world.lenvm), "--out", str(out), "--followed", "2"]  # fmt: skip
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    outcome = read_outcome(out / "results.json")
    assert outcome.sheet("Table 3").head == ["", "all", "open", "problem"]
    assert [str(r[0]) for r in outcome.sheet("Table 3").rows][2:] == [
        "mean of the other prompts", "mean of the domain's other prompts", "regression on the prompt's length",
        "best constant in hindsight", "noise floor of the truth",
    ]  # fmt: skip
    assert len(outcome.plots) == 3
    assert outcome.parameters["model"] == "tiny"
    rows = [json.loads(line) for line in world.prompts.read_text().splitlines()]
    other = tmp_path / "prompts.jsonl"
    other.write_text("".join(json.dumps({**r, "source": f"s{i % 3}"}) + "\n" for i, r in enumerate(rows)))
    assert {p.kind for p in read_natural(other, world.samples, domain="source").prompts} == {"s0", "s1", "s2"}
