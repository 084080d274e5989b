"""Trainings that differ in a choice, side by side: the paper's Figure 5 (over steps) and Figure 6 (along the answer)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.outcome import Cell, Outcome, Plot, Series, Sheet, new_outcome
from lenvm.evaluation.runs.read import Run

POSITIONS = (0, 25, 50, 75)
"""Per cent of the answer (Figure 6)."""
Group = tuple[str, list[tuple[str, Run]]]
"""What varies, and the variants with their labels, the reference first."""


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Variants by the settings in which they differ from the first run.

    Raises:
        EvaluationError: if what a run was given is not known and it has no name.
    """
    reference = runs[0]
    unknown = [run for run in runs if run.record is None]
    if unknown:
        nameless = [run for run in runs if run.name is None]
        if nameless:
            raise EvaluationError(
                f"{unknown[0].folder} has no training.json (an older lenvm did not write it), so what varies cannot be "
                f"read; name every run as NAME=FOLDER, {nameless[0].folder} first."
            )
        return [("training", [(str(run.name), run) for run in runs])]
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs[1:]:
        mine, others = run.choices, reference.choices
        keys = tuple(sorted(k for k in mine.keys() | others.keys() if mine.get(k) != others.get(k)))
        found.setdefault(keys, []).append(run)
    return [
        (", ".join(map(_short, keys)) or "same settings", [(_label(r, keys), r) for r in (reference, *variants)])
        for keys, variants in found.items()
    ]


def _short(key: str) -> str:
    return key.removeprefix("lenvm_")


def _label(run: Run, keys: Sequence[str]) -> str:
    if run.name is not None or not keys:
        return run.name or run.folder.name
    return ", ".join(_written(run.choices.get(key, "default")) for key in keys)


def _written(value: Any) -> str:
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) and "/" in value else str(value)


def ablations_outcome(runs: Sequence[Run], parameters: dict[str, Any]) -> Outcome:
    """Errors of all variants along the answer, and over the steps where several evaluations were logged.

    Args:
        runs: trainings evaluated on the same completions; the first is what the others are compared with.
        parameters: what should be recorded.

    Raises:
        EvaluationError: as `groups_of`, or if a metric is missing.
    """
    groups = groups_of(runs)
    head = ["varied", "choice", "MAE", *(f"at {p} %" for p in POSITIONS), "MRE %", "calibration %", "value loss", "steps"]
    rows: list[list[Cell]] = []
    for title, variants in groups:
        for i, (label, run) in enumerate(variants):
            cells: list[Cell] = [title, f"{label} (reference)" if i == 0 else label, run.metric("length_mae")]
            cells += [run.metric(f"length_mae_{p}") for p in POSITIONS]
            cells += [_percent(run, "mre"), _percent(run, "value_calibration_error"), run.metric("value_loss")]
            rows.append([*cells, run.curve[-1][0] if run.curve else None])
    return new_outcome(
        "ablations",
        "Choices of the training (Figures 5 and 6)",
        parameters,
        summary=[
            f"{len(runs)} trainings, evaluated on the same {runs[0].metrics['targets']} states. The first, "
            f"{runs[0].name or runs[0].folder.name}, is the reference: a variant belongs to the settings in which it "
            "differs from it."
        ],
        sheets=[
            Sheet(
                title="Error of the predicted remaining length, tokens",
                head=head,
                rows=rows,
                digits=[1] * 9 + [4],
                note="One training each, no interval: how much chance does is seen from trainings that differ in `seed` "
                "only. The value loss compares at equal gamma and target only.",
            )
        ],
        plots=[*map(_along, groups), *(p for p in map(_over_steps, groups) if p is not None)],
    )


def _percent(run: Run, metric: str) -> Cell:
    return 100.0 * run.metric(metric) if metric in run.metrics else None


def _name(prefix: str, title: str) -> str:
    return re.sub(r"[^a-z]+", "_", f"{prefix}_{title}".lower())


def _along(group: Group) -> Plot:
    title, variants = group
    places = [float(p) for p in POSITIONS]
    return Plot(
        name=_name("along", title),
        title=title,
        x_label="% of the answer seen",
        y_label="error in tokens",
        series=[
            Series(label=label, x=places, y=[run.metric(f"length_mae_{p}") for p in POSITIONS])
            for label, run in variants
        ],
    )


def _over_steps(group: Group) -> Plot | None:
    title, variants = group
    curves = [(label, [(s, m["length_mae"]) for s, m in run.curve if "length_mae" in m]) for label, run in variants]
    curves = [(label, points) for label, points in curves if len(points) > 1]
    if not curves:
        return None
    return Plot(
        name=_name("steps", title),
        title=f"{title}, over the training",
        x_label="optimizer step",
        y_label="error in tokens",
        series=[Series(label=label, x=[float(s) for s, _ in points], y=[e for _, e in points])
                for label, points in curves],
    )  # fmt: skip
