"""Accuracy against length: pass@k, curves and areas by hand, math-verify, and the command against a server."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lenvm.cli import main
from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.grading import verified
from lenvm.evaluation.metrics import pass_at_k
from lenvm.evaluation.outcome import read_outcome
from lenvm.evaluation.problems import read_problems
from lenvm.evaluation.schema import Estimate
from lenvm.evaluation.tradeoff import Curve, Graded, TradeoffSizes, curves_of, make_plan, mean_accuracy
from lenvm.instructions import MATH


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for right in range(7):
        answers = [True] * right + [False] * (6 - right)
        for k in (1, 2, 3, 6):
            subsets = list(itertools.combinations(answers, k))
            assert float(pass_at_k(6, right, k)) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="1 <= k <= 6"):
        pass_at_k(6, 1, 7)


def test_curves_by_hand():
    # two problems, two answers each; the shorter answer of each problem is wrong
    base = Graded(np.array([[10.0, 20.0], [30.0, 40.0]]), np.array([[0.0, 1.0], [0.0, 1.0]]))
    short = Graded(np.array([[6.0, 8.0], [10.0, 16.0]]), np.array([[1.0, 1.0], [0.0, 1.0]]))
    sizes = TradeoffSizes(samples=2, biases=(-5.0, 0.0, 5.0), budgets=(12,))
    found = {("base", "base"): base, ("bias", "-5"): short, ("bias", "0"): base, ("bias", "5"): base,
             ("budget", "12"): short}  # fmt: skip
    cutting, tilting, bounded = curves_of(found, sizes)
    # cut at 10: all four are 10 long and none is right; at 20: 10, 20, 20, 20, one of four; at 30; at 40: untouched
    assert cutting.lengths.mean(-1).tolist() == [10.0, 17.5, 22.5, 25.0]
    assert cutting.accuracies.mean(-1).tolist() == [0.0, 0.25, 0.25, 0.5]
    assert tilting.lengths.mean(-1).tolist() == [10.0, 25.0]  # beta = 5 lengthens: it is no point of this curve
    assert tilting.accuracies.mean(-1).tolist() == [0.75, 0.5]
    # the budget of 12 cuts the answer of 16: wrong, 12 long
    assert bounded.lengths.mean(-1).tolist() == [9.0, 25.0]
    assert bounded.accuracies.mean(-1).tolist() == [0.5, 0.5]
    ones = np.ones((1, 2))
    assert float(mean_accuracy(bounded, 10, 20, ones)[0]) == pytest.approx(0.5)
    assert float(mean_accuracy(tilting, 10, 25, ones)[0]) == pytest.approx(0.625)
    # trapezoids of the cutting curve: (0 + .25) / 2 * 7.5 + .25 * 5 + .375 * 2.5 = 3.125, over 15
    assert float(mean_accuracy(cutting, 10, 25, ones)[0]) == pytest.approx(3.125 / 15, abs=2e-3)


def test_a_problem_counted_twice_is_a_problem_repeated():
    curve = Curve("x", np.array([[1.0, 3.0], [4.0, 8.0]]), np.array([[0.0, 1.0], [1.0, 0.0]]))
    doubled = Curve("x", np.array([[1.0, 1.0, 3.0], [4.0, 4.0, 8.0]]), np.array([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]))
    grid = np.linspace(2, 5, 7)
    assert curve.at(grid, np.array([[2.0, 1.0]])) == pytest.approx(doubled.at(grid, np.ones((1, 3))))


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [(r"So it is $\boxed{\frac{1}{2}}$.", "0.5", True),
     (r"\boxed{(3, \frac{\pi}{2})}", r"\left(3,\frac{\pi}{2}\right)", True),
     ("the total is 1,234.", "a - b = 1234\n#### 1,234", True), (r"\boxed{17}", "#### 18", False),
     (r"\boxed{x^2+2x+1}", "(x+1)^2", True), ("no idea", "3", False)],
)  # fmt: skip
def test_math_verify(text: str, answer: str, right: bool):
    assert verified(text, answer) is right


def test_problem_files(tmp_path):
    gsm, math = tmp_path / "gsm.jsonl", tmp_path / "math.jsonl"
    gsm.write_text(json.dumps({"question": "2 + 2?", "answer": "easy #### 4"}) + "\n")
    math.write_text("".join(json.dumps({"problem": f"q{i}", "solution": "s", "answer": "1"}) + "\n" for i in range(9)))
    (one,) = read_problems(gsm)
    assert one.messages == [{"role": "user", "content": f"{MATH}\n\n2 + 2?"}]
    assert one.answer == "easy #### 4"
    assert [p.messages[0]["content"] for p in read_problems(math, 3, "")] == ["q0", "q3", "q6"]
    assert read_problems(math, question="solution")[0].messages[0]["content"].endswith("\ns")
    for line, message in (
        ({"answer": "1"}, "neither `messages` nor question or problem"),
        ({"question": "x"}, "no `answer`"),
    ):
        gsm.write_text(json.dumps(line) + "\n")
        with pytest.raises(EvaluationError, match=message):
            read_problems(gsm)


def test_the_plan_differs_in_length_fields_only(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"question": "x", "answer": "1"}) + "\n")
    plan = make_plan(read_problems(path), TradeoffSizes(samples=2, biases=(-1.0, 0.0), budgets=(9,)))
    assert [r.fields for r in plan[::2]] == [
        {}, {"length_bias": -1.0}, {"length_bias": 0.0}, {"length_target": 9, "length_mode": "at_most"}
    ]  # fmt: skip
    assert len({r.key for r in plan}) == len(plan) == 8


def test_the_command(world, fake_server, tmp_path):
    out = tmp_path / "tradeoff"
    words = ["eval", "tradeoff", "--server", fake_server.url, "--data", str(world.prompts), "--base", str(world.base),
             "--out", str(out), "--samples", "4", "--biases=-5,0", "--budgets", "10,20", "--passes", "1,2",
             "--max-tokens", "64"]  # fmt: skip
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    outcome = read_outcome(out / "results.json")
    settings = {str(r[0]): r for r in outcome.sheet("Settings").rows}
    assert list(settings) == ["base model", "length_bias -5", "length_bias 0", "at_most 10", "at_most 20"]
    base, bounded = settings["base model"], settings["at_most 10"]
    assert isinstance(base[1], Estimate) and isinstance(bounded[1], Estimate) and isinstance(bounded[5], Estimate)
    assert base[1].n == 32
    assert bounded[1].value <= 10
    assert bounded[5].value == 0.0
    assert isinstance(base[2], Estimate) and isinstance(base[3], Estimate)
    assert base[2].value < base[3].value
    area = outcome.sheet("Area under")
    assert [str(r[0]) for r in area.rows] == [
        "cutting the base's answers", "tilting by length_bias", "posterior at_most"
    ]  # fmt: skip
    assert isinstance(area.rows[2][2], Estimate)
    assert area.rows[2][2].value > 0
    # the base model draws from as many candidates as the server scores, or the curves could not meet
    assert {(b.get("min_p"), b.get("top_k")) for b in fake_server.seen} == {(0.01, 12)}
    assert outcome.parameters["sampling"]["top_k"] == 12
    other = CliRunner().invoke(main, [*words, "--top-k", "5"])
    assert "use the same parameters or another --out" in " ".join(other.output.split()), other.output
    off = CliRunner().invoke(main, [*words[:-1], "63", "--top-k", "-1", "--out", str(tmp_path / "off")])
    assert off.exit_code == 0, off.output
    assert {b.get("top_k") for b in fake_server.seen if b["max_tokens"] == 63} == {None}
    many = CliRunner().invoke(main, [*words, "--passes", "8"])
    assert many.exit_code == 2
    above = CliRunner().invoke(main, [*words, "--budgets", "99"])
    assert "above --max-tokens" in " ".join(above.output.split())


def test_problems_that_do_not_fit_are_left_out_and_counted(world, fake_server, tmp_path):
    data = tmp_path / "problems.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"w{i} " * (50 if i == 2 else 5)}], "answer": str(i), "id": i}
            for i in range(4)]  # fmt: skip
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ["eval", "tradeoff", "--server", fake_server.url, "--data", str(data), "--out", str(tmp_path / "o"),
             "--samples", "1", "--biases=-5", "--max-tokens", "64"]  # fmt: skip
    without = CliRunner().invoke(main, [*words, "--max-prompt-tokens", "20"])
    assert without.exit_code == 2
    assert "needs --base" in " ".join(without.output.split())
    words += ["--base", str(world.base), "--max-prompt-tokens"]
    done = CliRunner().invoke(main, [*words, "20"])
    assert done.exit_code == 0, done.output
    summary = read_outcome(tmp_path / "o" / "results.json").summary
    assert summary[0].startswith("3 problems")
    assert summary[-1] == "1 problems were left out: their prompts have more than 20 tokens."
    none = CliRunner().invoke(main, [*words, "1"])
    assert "0 of 4 prompts have at most 1 tokens" in " ".join(none.output.split())


def test_problems_with_images_are_asked_with_them(world, fake_server, tmp_path):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "red.png")
    data = tmp_path / "vista.jsonl"
    rows = [{"pid": i, "question": f"w{i} <image> here?", "image": "red.png", "answer": str(i)} for i in range(2)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    problems = read_problems(data, instruction="")
    assert [p.id for p in problems] == ["0", "1"]
    assert [part["type"] for part in problems[1].messages[0]["content"]] == ["text", "image", "text"]
    (text, image, _) = problems[1].asked[0]["content"]
    assert text["text"] == "w1 "
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    words = ["eval", "tradeoff", "--server", fake_server.url, "--data", str(data), "--out", str(tmp_path / "o")]
    refused = CliRunner().invoke(main, [*words, "--base", str(world.base)])
    assert refused.exit_code == 1
    assert "these problems have images" in " ".join(refused.output.split())
    data.write_text(json.dumps({**rows[0], "image": "blue.png"}) + "\n")
    with pytest.raises(EvaluationError, match=r"line 1: the image 'blue.png' cannot be read"):
        read_problems(data)
    data.write_text(json.dumps({**rows[0], "question": "<image> and <image>"}) + "\n")
    with pytest.raises(EvaluationError, match=r"show 2 image\(s\) and the row has 1"):
        read_problems(data)
