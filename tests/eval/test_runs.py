"""Finished trainings side by side: what is read of their folders, how variants are grouped, fits, the two commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lenvm.cli import main
from lenvm.evaluation.outcome import read_outcome
from lenvm.evaluation.runs.ablations import groups_of
from lenvm.evaluation.runs.read import read_runs
from lenvm.evaluation.runs.record import DataFacts, TrainingRecord
from lenvm.evaluation.runs.scaling import fit_power, series_of

VALIDATION = DataFacts.of([5, 5, 6], [9, 8, 7])


def write_run(
    folder: Path, error: float, prompts: int = 100, samples: int = 4, parameters: int = 1000,
    evaluated: DataFacts = VALIDATION, steps: tuple[int, ...] = (), record: bool = True, **settings: Any,
) -> str:  # fmt: skip
    """A training's folder, its record by the writer of `stage: lenvm`; the error falls along answer and steps."""
    metrics = {"length_mae": error, "value_loss": error / 100, "mre": error / 50, "value_calibration_error": 0.1}
    metrics |= {f"length_mae_{p}": error * (1.0 - p / 100) for p in (0, 25, 50, 75)}
    named = {f"eval_{k}": v for k, v in (metrics | {"targets": evaluated.tokens}).items()}
    base = {"lenvm_target": "return", "lenvm_gamma": "auto", "output_dir": str(folder), "model_name_or_path": "a/base"}
    if record:
        hashes = np.repeat(np.arange(prompts), samples)
        TrainingRecord(
            settings=base | settings, parameters=parameters, trainable=parameters,
            train=DataFacts.of(hashes, hashes + 1), evaluation={"eval": evaluated},
        ).write(folder)  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "eval_results.json").write_text(json.dumps(named))
    history = [{"step": s, "epoch": 1.0, **named, "eval_length_mae": error + 100 - s} for s in steps]
    state = {"global_step": 100, "log_history": [{"loss": 1.0, "step": 1}, *history, {"train_loss": 1.0, "step": 100}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return str(folder)


def lenvm(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["eval", *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


def test_variants_are_found_by_what_differs(tmp_path: Path) -> None:
    words = [
        write_run(tmp_path / "reference", 10.0),
        write_run(tmp_path / "log", 12.0, lenvm_target="log_length", logging_steps=5),
        write_run(tmp_path / "gamma", 11.0, lenvm_gamma="0.9"),
        write_run(tmp_path / "raw", 14.0, lenvm_target="length"),
        write_run(tmp_path / "both", 13.0, lenvm_gamma="0.9", lenvm_target="length"),
        write_run(tmp_path / "few", 15.0, samples=1),
        write_run(tmp_path / "half", 16.0, bf16=True),
        f"mine={write_run(tmp_path / 'seed', 10.5, seed=1)}",
    ]
    found = {title: [label for label, _ in variants] for title, variants in groups_of(read_runs(words))}
    assert found == {
        "target": ["return", "log_length", "length"],
        "gamma": ["auto", "0.9"],
        "gamma, target": ["auto, return", "0.9, length"],
        "samples per prompt": ["4", "1"],
        "bf16": ["default", "True"],
        "seed": ["default", "mine"],
    }


def test_ablations_writes_tables_and_figures(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", 10.0, steps=(50,))
    second = write_run(tmp_path / "b", 20.0, steps=(50, 100), lenvm_weighting="trajectory")
    out = tmp_path / "out"
    status, printed = lenvm("ablations", first, second, "--out", str(out))
    assert status == 0 and "trajectory" in printed
    outcome = read_outcome(out / "results.json")
    assert outcome.sheets[0].rows[1] == [
        "weighting", "trajectory", 20.0, 20.0, 15.0, 10.0, 5.0, 40.0, 10.0, 0.2, 100
    ]  # fmt: skip
    along, steps = outcome.plots
    assert [s.y for s in along.series] == [[10.0, 7.5, 5.0, 2.5], [20.0, 15.0, 10.0, 5.0]]
    # the evaluation behind the training is a point of its own unless one was logged at the last step
    assert [(s.x, s.y) for s in steps.series] == [([50, 100], [60.0, 10.0]), ([50, 100], [70.0, 20.0])]
    assert (out / "figures.png").read_bytes().startswith(b"\x89PNG")
    with (out / "table.csv").open() as file:
        assert [row["MAE"] for row in csv.DictReader(file)] == ["10.0", "20.0"]
    assert "| weighting | trajectory | 20.0 |" in (out / "tables.md").read_text()
    page = tmp_path / "page.html"
    assert CliRunner().invoke(main, ["report", str(out), "--out", str(page)]).exit_code == 0
    assert "trajectory" in page.read_text()
    assert lenvm("show", str(out))[0] == 0


def test_the_best_checkpoint_of_a_run_is_no_point_of_its_last_step(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", 10.0, steps=(40, 80), load_best_model_at_end=True)
    run = read_runs([first, first])[0]
    assert [step for step, _ in run.curve] == [40, 80]


def test_folders_without_a_record_need_names(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name, 10.0, record=False) for name in "ab")
    status, printed = lenvm("ablations", first, second, "--out", str(tmp_path / "out"))
    assert status == 1 and "name every run as NAME=FOLDER" in printed
    ((title, variants),) = groups_of(read_runs([f"x={first}", f"y={second}"]))
    assert title == "training" and [label for label, _ in variants] == ["x", "y"]
    status, printed = lenvm("scaling", f"x={first}", f"y={second}", "--out", str(tmp_path / "out"))
    assert status == 1 and "a/training.json" in printed.replace(" ", "")


def test_several_evaluation_sets(tmp_path: Path) -> None:
    words = []
    for name in "ab":
        folder = Path(write_run(tmp_path / name, 10.0, record=False))
        found = json.loads((folder / "eval_results.json").read_text())
        changed = {k.replace("eval_", "eval_math_"): v for k, v in found.items()}
        (folder / "eval_results.json").write_text(json.dumps(changed))
        words.append(f"{name}={folder}")
    status, printed = lenvm("ablations", *words, "--out", str(tmp_path / "out"))
    assert status == 1 and "give --evaluation-set, one of math." in printed
    assert lenvm("ablations", *words, "--out", str(tmp_path / "out"), "--evaluation-set", "math")[0] == 0


def test_what_is_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", 10.0)
    other = write_run(tmp_path / "b", 10.0, evaluated=DataFacts.of([5, 5, 6], [9, 8, 6]))
    same_counts = write_run(tmp_path / "e", 10.0, evaluated=DataFacts.of([5, 7, 6], [9, 8, 7]))
    broken = write_run(tmp_path / "c", 10.0)
    (Path(broken) / "training.json").write_text("{")
    wrong = write_run(tmp_path / "d", 10.0)
    (Path(wrong) / "training.json").write_text('{"format": 2}')
    plain = tmp_path / "sft"
    plain.mkdir()
    (plain / "eval_results.json").write_text('{"eval_loss": 1.0}')
    for words, said in (
        ([first], "at least two trainings are compared, got 1"),
        ([first, str(tmp_path / "none")], "there is no folder"),
        ([first, str(tmp_path)], "eval_results.json; train with `do_eval: true`"),
        ([first, other], "were evaluated on different completions"),
        ([first, same_counts], "were evaluated on different completions"),
        ([first, broken], "training.json is not JSON"),
        ([first, wrong], "is not valid at format"),
        ([first, str(plain)], "it is no `stage: lenvm` run"),
    ):
        status, printed = lenvm("ablations", *words, "--out", str(tmp_path / "out"))
        assert (status, said in printed) == (1, True), printed
    status, printed = lenvm("scaling", first, first, "--out", str(tmp_path / "out"))
    assert status == 1 and "give trainings that vary one at a time" in printed
    status, printed = lenvm("scaling", first, first, "--metric", "accuracy", "--out", str(tmp_path / "out"))
    assert status == 2 and "accuracy" in printed


def test_fit_of_a_power_law() -> None:
    x = [1.0, 2.0, 4.0, 16.0]
    fit = fit_power(x, [3.0 * n**-0.25 for n in x])
    assert fit is not None
    assert (fit.slope, np.exp(fit.start), fit.residual) == pytest.approx((-0.25, 3.0, 0.0), abs=1e-9)
    assert fit_power([1.0, 2.0], [3.0, 2.0]) is None
    assert fit_power([1.0, 2.0, 2.0], [3.0, 2.0, 2.1]) is None


def test_scaling_finds_the_axes(tmp_path: Path) -> None:
    words = [write_run(tmp_path / f"s{n}", 20.0 * n**-0.5, samples=n) for n in (1, 2, 4)]
    words += [write_run(tmp_path / "p50", 12.0, prompts=50), write_run(tmp_path / "big", 8.0, parameters=2000)]
    words += [write_run(tmp_path / "lost", 12.0, prompts=99, samples=2)]  # as many prompts as 100, but for a bad row
    runs = read_runs(words)
    names = {
        axis: [[run.folder.name for run in part] for part in series_of(runs, axis)]
        for axis in ("samples per prompt", "prompts", "parameters")
    }
    assert names == {
        "samples per prompt": [["s1", "s2", "lost", "s4"]],
        "prompts": [["p50", "s4"]],
        "parameters": [["s4", "big"]],
    }
    out = tmp_path / "out"
    status, printed = lenvm("scaling", *words[:5], "--out", str(out))
    assert status == 0, printed
    outcome = read_outcome(out / "results.json")
    ((axis, _, slope, residual, points),) = outcome.sheet("Fits").rows
    assert (axis, points) == ("samples per prompt", 3)
    assert slope == pytest.approx(-0.5) and residual == pytest.approx(0.0, abs=1e-9)
    assert [p.title for p in outcome.plots] == ["samples per prompt", "prompts", "parameters"]
    assert (out / "figures.png").is_file()
    assert len(outcome.summary) == 1
    write_run(tmp_path / "big", 8.0, parameters=2000, learning_rate=1e-4)
    lenvm("scaling", *words[:5], "--out", str(out))
    assert "also differ in learning_rate" in read_outcome(out / "results.json").summary[1]
