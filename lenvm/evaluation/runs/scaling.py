"""Error against the number of samples, prompts and parameters: the paper's Figure 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.outcome import Cell, Outcome, Plot, Series, Sheet, new_outcome
from lenvm.evaluation.runs.read import whole, Run
from lenvm.evaluation.runs.record import RECORD_FILE

AXES = ("samples per prompt", "prompts", "parameters")
METRICS = ("length_mae", "value_loss", "length_nll", "loss", "mre", "expected_length_mae")
SAME = 1.02
"""Sizes that differ by less are the same: a few rows may be left out of one of two data sets."""
MIN_FITTED = 3
"""Points that a fitted line needs: two lie on one always."""


@dataclass(frozen=True)
class Fit:
    """error = exp(start) x^slope, least squares of the logarithms.

    Attributes:
        slope: per cent of error for one per cent of x.
        residual: root mean square of the logarithms' residuals.
    """

    start: float
    slope: float
    residual: float


def fit_power(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """A line through the logarithms; None for fewer than MIN_FITTED different x.

    Args:
        x: sizes above 0.
        y: errors above 0.
    """
    if len(set(x)) < MIN_FITTED:
        return None
    log_x, log_y = np.log(np.asarray(x, np.float64)), np.log(np.asarray(y, np.float64))
    slope, start = np.polyfit(log_x, log_y, 1)
    residual = float(np.sqrt(np.mean((log_y - start - slope * log_x) ** 2)))
    return Fit(float(start), float(slope), residual)


def sizes_of(run: Run) -> dict[str, float]:
    """The run's place on each axis.

    Raises:
        EvaluationError: if its folder does not tell it.
    """
    if run.record is None:
        raise EvaluationError(
            f"there is no {run.folder / RECORD_FILE}, which says how much a training was given; train again with this "
            "version of lenvm."
        )
    data = run.record.train
    if data is None:
        raise EvaluationError(f"{run.folder} was trained on a stream, whose size is not known; train on a file.")
    sizes = (data.completions / data.prompts, float(data.prompts), float(run.record.parameters))
    return dict(zip(AXES, sizes, strict=True))


def series_of(runs: Sequence[Run], axis: str) -> list[list[Run]]:
    """Runs that agree in the two other sizes and differ in this one, smallest first."""
    classes = {name: _classes([sizes_of(run)[name] for run in runs]) for name in AXES}
    found: dict[tuple[int, ...], list[int]] = {}
    for i in range(len(runs)):
        found.setdefault(tuple(classes[name][i] for name in AXES if name != axis), []).append(i)
    return [
        sorted((runs[i] for i in part), key=lambda run: sizes_of(run)[axis])
        for part in found.values()
        if len({classes[axis][i] for i in part}) > 1
    ]


def _classes(values: Sequence[float]) -> list[int]:
    """The same number for values that are the same up to SAME."""
    starts: list[float] = []
    for value in sorted(values):
        if not starts or value > SAME * starts[-1]:
            starts.append(value)
    return [int(np.searchsorted(starts, value, side="right")) - 1 for value in values]


def scaling_outcome(runs: Sequence[Run], metric: str, parameters: dict[str, Any]) -> Outcome:
    """A table and a log-log figure for each axis on which runs differ.

    Args:
        runs: trainings evaluated on the same completions.
        metric: one of METRICS.
        parameters: what should be recorded.

    Raises:
        EvaluationError: if no two runs differ in one size alone, or a size or the metric is unknown.
    """
    rows: list[list[Cell]] = []
    fits: list[list[Cell]] = []
    plots = []
    for axis in AXES:
        drawn = []
        for part in series_of(runs, axis):
            others = ", ".join(f"{whole(round(sizes_of(part[0])[name], 1)):,} {name}" for name in AXES if name != axis)
            x, y = [sizes_of(run)[axis] for run in part], [run.metric(metric) for run in part]
            rows += [
                [axis, others, whole(size), error, run.name or run.folder.name]
                for run, size, error in zip(part, x, y, strict=True)
            ]
            drawn.append(Series(label=others, x=x, y=y, style="points"))
            fit = fit_power(x, y) if min(y) > 0 else None
            if fit is not None:
                fits.append([axis, others, fit.slope, 100.0 * fit.residual, len(x)])
                line = [float(np.exp(fit.start) * size**fit.slope) for size in (x[0], x[-1])]
                drawn.append(Series(label=f"slope {fit.slope:.3f}", x=[x[0], x[-1]], y=line, colour="base"))
        if drawn:
            name = axis.replace(" ", "_")
            plots.append(Plot(name=name, title=axis, x_label=axis, y_label=metric, series=drawn, log=True))
    if not plots:
        raise EvaluationError(
            f"no two of the {len(runs)} trainings differ in one of {', '.join(AXES)} and agree in the others; give "
            "trainings that vary one at a time."
        )
    sheets = [
        Sheet(
            title=f"{metric} of each training",
            head=["axis", "held fixed", "size", metric, "run"],
            rows=rows,
            digits=[0, 0, 1, 4],
            note="One training each, no interval.",
        )
    ]
    if fits:
        sheets.append(
            Sheet(
                title="Fits: log error on log size",
                head=["axis", "held fixed", "slope", "residual %", "points"],
                rows=fits,
                digits=[0, 0, 3],
                note=f"Where there are {MIN_FITTED} sizes or more. A slope of -0.1: twice the size, 7 % less error.",
            )
        )
    states = runs[0].metrics["targets"]
    return new_outcome(
        "scaling",
        "Error against samples, prompts and parameters (Figure 3)",
        parameters,
        summary=[f"{len(runs)} trainings, evaluated on the same {states} states.", *_also_varied(runs)],
        sheets=sheets,
        plots=plots,
    )


def _also_varied(runs: Sequence[Run]) -> list[str]:
    """A sentence if the runs differ in settings too, which then may be what the figures show."""
    size = {*AXES, "model_name_or_path"}
    every = [{k: v for k, v in run.choices.items() if k not in size} for run in runs]
    keys = sorted({k for choices in every for k in choices if any(o.get(k) != choices[k] for o in every)})
    return [f"They also differ in {', '.join(keys)}: what the figures show may come from there."] if keys else []
