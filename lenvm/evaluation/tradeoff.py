"""Accuracy against length (section 3.3, Figure 2): tilting and budgets against cutting the base's own answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from lenvm.evaluation.assemble import TextScore
from lenvm.evaluation.bootstrap import Interval, interval_ends, mean_interval, replicate_weights, share_interval
from lenvm.evaluation.client import Answer
from lenvm.evaluation.metrics import Floats, hard_cut, pass_at_k
from lenvm.evaluation.outcome import Cell, Outcome, Plot, Series, Sheet, new_outcome
from lenvm.evaluation.plan import Request, stable_seed
from lenvm.evaluation.problems import Problem
from lenvm.evaluation.schema import Estimate

CUTS = 40
"""Budgets of the cutting curve."""
GRID = 129
"""Lengths at which curves are compared."""


class TradeoffSizes(BaseModel):
    """What is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    samples: int = Field(default=8, ge=1)
    biases: tuple[float, ...] = (-40.0, -16.0, -6.0, -2.0, 0.0)
    budgets: tuple[int, ...] = ()
    passes: tuple[int, ...] = (1,)
    seed: int = 0

    @field_validator("budgets", "passes")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(v < 1 for v in value):
            raise ValueError("must be whole numbers from 1")
        return tuple(sorted(set(value)))


@dataclass(frozen=True)
class Setting:
    """One way to answer: its place in the plan, its name, and the bound that its answers are held to."""

    experiment: str
    key: str
    label: str
    fields: Mapping[str, Any]
    budget: int | None = None


def settings_of(sizes: TradeoffSizes) -> list[Setting]:
    """The base model, every beta, every budget."""
    found = [Setting("base", "base", "base model", {})]
    found += [Setting("bias", f"{b:g}", f"length_bias {b:g}", {"length_bias": b}) for b in sorted(sizes.biases)]
    for t in sizes.budgets:
        found.append(Setting("budget", str(t), f"at_most {t}", {"length_target": t, "length_mode": "at_most"}, t))
    return found


def make_plan(problems: Sequence[Problem], sizes: TradeoffSizes) -> list[Request]:
    """Every request; all settings sample alike, only the length fields differ."""
    return list(_requests(problems, sizes))


def _requests(problems: Sequence[Problem], sizes: TradeoffSizes) -> Iterator[Request]:
    for s in settings_of(sizes):
        for problem in problems:
            for k in range(sizes.samples):
                seed = stable_seed(sizes.seed, "tradeoff", s.experiment, s.key, problem.id, k)
                yield Request(s.experiment, s.key, problem.id, s.budget, k, seed, dict(s.fields))


@dataclass(frozen=True)
class Graded:
    """Answers of one setting: lengths and correctness as they came, [problems, samples] each."""

    lengths: Floats
    right: Floats

    def held_to(self, budget: float | None) -> Graded:
        """The rule of section 3.3: longer than the budget is wrong and as long as the budget."""
        return self if budget is None else Graded(*hard_cut(self.lengths, self.right, budget))

    @property
    def point(self) -> tuple[Floats, Floats]:
        """Mean length and accuracy of each problem, [problems] each."""
        return self.lengths.mean(-1), self.right.mean(-1)


def graded(
    answers: Sequence[Answer], problems: Sequence[Problem], sizes: TradeoffSizes, judge: Callable[[str, str], bool]
) -> dict[tuple[str, str], Graded]:
    """Lengths and correctness by (experiment, key). An answer that max_tokens cut is wrong.

    Args:
        answers: of the whole plan.
        problems: in the order of the rows.
        sizes: of the plan.
        judge: (completion, expected answer) -> right?
    """
    place = {p.id: i for i, p in enumerate(problems)}
    shape = (len(problems), sizes.samples)
    found = {(s.experiment, s.key): Graded(np.zeros(shape), np.zeros(shape)) for s in settings_of(sizes)}
    known: dict[tuple[str, str], bool] = {}
    for a in answers:
        one = found[a.request.experiment, a.request.controller]
        i, k = place[a.request.prompt_id], a.request.sample
        one.lengths[i, k] = a.length
        if a.finish_reason == "stop":
            key = a.text, problems[i].answer
            if key not in known:
                known[key] = judge(*key)
            one.right[i, k] = known[key]
    return found


@dataclass(frozen=True)
class Curve:
    """Points of one method, each with the mean length and accuracy of every problem, [points, problems]."""

    label: str
    lengths: Floats
    accuracies: Floats

    def at(self, grid: Floats, weights: Floats) -> Floats:
        """Accuracy at given mean lengths, linear between the points.

        Args:
            grid: [G] mean lengths.
            weights: [R, problems] how often each problem counts; rows of ones are the estimate itself.

        Returns:
            [R, G].
        """
        total = weights.sum(-1, keepdims=True)
        x, y = weights @ self.lengths.T / total, weights @ self.accuracies.T / total
        order = np.argsort(x, axis=-1, kind="stable")
        x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
        return np.stack([np.interp(grid, row_x, row_y) for row_x, row_y in zip(x, y, strict=True)])


def mean_accuracy(curve: Curve, low: float, high: float, weights: Floats) -> Floats:
    """Area under a curve between two mean lengths, divided by their distance: a mean accuracy, [R]."""
    grid = np.linspace(low, high, GRID)
    values = curve.at(grid, weights)
    return np.asarray(((values[:, 1:] + values[:, :-1]) / 2.0).mean(-1))  # trapezoids of equal width


def curves_of(found: Mapping[tuple[str, str], Graded], sizes: TradeoffSizes) -> list[Curve]:
    """Cutting the base's answers, tilting (beta <= 0), posterior at_most; the last two end in the base model itself."""
    base = found["base", "base"]
    budgets = np.unique(np.quantile(base.lengths, np.linspace(0.0, 1.0, CUTS), method="inverted_cdf"))
    groups: dict[str, list[Graded]] = {"cutting the base's answers": [base.held_to(float(b)) for b in budgets]}
    shorter = [s for s in settings_of(sizes) if s.experiment == "bias" and s.fields["length_bias"] < 0]
    if shorter:
        groups["tilting by length_bias"] = [*(found[s.experiment, s.key] for s in shorter), base]
    bounded = [s for s in settings_of(sizes) if s.experiment == "budget"]
    if bounded:
        groups["posterior at_most"] = [*(found[s.experiment, s.key].held_to(s.budget) for s in bounded), base]
    curves = []
    for label, points in groups.items():
        pairs = [p.point for p in points]
        curves.append(Curve(label, np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs])))
    return curves


def tradeoff_outcome(
    problems: Sequence[Problem],
    answers: Sequence[Answer],
    found: Mapping[tuple[str, str], Graded],
    sizes: TradeoffSizes,
    parameters: dict[str, Any],
    log_probs: Mapping[str, TextScore] | None = None,
) -> Outcome:
    """Tables and curves. Intervals resample problems.

    Args:
        problems: [P].
        answers: of the whole plan.
        found: their lengths and correctness.
        sizes: of the plan.
        parameters: recorded with the results.
        log_probs: base log-probability of some answers by request key.
    """
    curves = curves_of(found, sizes)
    area = _areas(curves)
    return new_outcome(
        "tradeoff",
        "Accuracy against length",
        parameters,
        summary=[
            f"{len(problems)} problems, {sizes.samples} answers each and setting; all settings share the sampling "
            "parameters. An answer longer than its budget, or cut by max_tokens, is wrong and as long as the bound.",
        ],
        sheets=[_settings_sheet(problems, answers, found, sizes, log_probs or {}), *([area] if area else [])],
        plots=[_plot(curves)],
    )


def _settings_sheet(
    problems: Sequence[Problem],
    answers: Sequence[Answer],
    found: Mapping[tuple[str, str], Graded],
    sizes: TradeoffSizes,
    log_probs: Mapping[str, TextScore],
) -> Sheet:
    ids = [p.id for p in problems]
    each = [i for i in ids for _ in range(sizes.samples)]
    base = curves_of(found, sizes)[0]
    rows: list[list[Cell]] = []
    for s in settings_of(sizes):
        raw = found[s.experiment, s.key]
        g = raw.held_to(s.budget)
        mine = [a for a in answers if (a.request.experiment, a.request.controller) == (s.experiment, s.key)]
        solved = float(g.right.sum())
        length = float(g.lengths.mean())
        ones = np.ones((1, len(problems)))
        scored = [(log_probs[a.request.key].mean, a.request.prompt_id) for a in mine if a.request.key in log_probs]
        over = None
        if s.budget is not None:
            over = Estimate.of(share_interval((raw.lengths > s.budget).astype(np.float64).ravel(), each), 100.0)
        rows.append(
            [
                s.label,
                Estimate.of(mean_interval(g.lengths.ravel(), each)),
                *(
                    Estimate.of(mean_interval(pass_at_k(sizes.samples, g.right.sum(-1), k), ids), 100.0)
                    for k in sizes.passes
                ),
                None if s.experiment == "base" else 100.0 * float(base.at(np.array([length]), ones)[0, 0]),
                over,
                None if not solved else float(g.lengths.sum()) / solved,
                None if not solved else sum(a.seconds for a in mine) / solved,
                Estimate.of(mean_interval([v for v, _ in scored], [p for _, p in scored])),
            ]
        )
    head = ["", "mean truncated L", *(f"pass@{k} %" for k in sizes.passes), "cut at that length %", "over budget %"]
    return Sheet(
        title="Settings",
        head=[*head, "tokens a solved", "seconds a solved", "base log p/token"],
        rows=rows,
        digits=[1, 1, *(1 for _ in sizes.passes), 1, 1, 0, 2, 2],
        note="Seconds are from sending to receiving, with the other requests in flight: compare them with each other.",
    )


def _areas(curves: Sequence[Curve]) -> Sheet | None:
    """Mean accuracy of each curve over the lengths that all of them reach, and what it gains over cutting."""
    low = max(float(c.lengths.mean(-1).min()) for c in curves)
    high = min(float(c.lengths.mean(-1).max()) for c in curves)
    if len(curves) < 2 or high - low <= 0:
        return None
    weights = replicate_weights(curves[0].lengths.shape[1])
    ones = np.ones((1, weights.shape[1]))
    cut, cut_draws = mean_accuracy(curves[0], low, high, ones)[0], mean_accuracy(curves[0], low, high, weights)
    n, problems = curves[0].lengths.size, weights.shape[1]
    rows: list[list[Cell]] = []
    for curve in curves:
        value, draws = mean_accuracy(curve, low, high, ones)[0], mean_accuracy(curve, low, high, weights)
        own = Interval(float(value), *interval_ends(draws), n, problems)
        gain = Interval(float(value - cut), *interval_ends(draws - cut_draws), n, problems)
        rows.append([curve.label, Estimate.of(own, 100.0), None if curve is curves[0] else Estimate.of(gain, 100.0)])
    return Sheet(
        title=f"Area under the curves, mean lengths from {low:.1f} to {high:.1f} tokens",
        head=["", "mean accuracy %", "minus cutting"],
        rows=rows,
        note="The area divided by the range of lengths that every curve covers.",
    )


def _plot(curves: Sequence[Curve]) -> Plot:
    weights = replicate_weights(curves[0].lengths.shape[1])
    total = weights.sum(-1, keepdims=True)
    series = []
    for curve, colour in zip(curves, ("base", "bias", "posterior"), strict=False):
        x, y = curve.lengths.mean(-1), 100.0 * curve.accuracies.mean(-1)
        ends = np.quantile(100.0 * (weights @ curve.accuracies.T) / total, [0.025, 0.975], axis=0)
        order = np.argsort(x, kind="stable")
        series.append(
            Series(label=curve.label, x=x[order].tolist(), y=y[order].tolist(), y_low=ends[0][order].tolist(),
                   y_high=ends[1][order].tolist(), colour=colour)
        )  # fmt: skip
    return Plot(name="tradeoff", title="Accuracy against mean truncated length", series=series,
                x_label="mean truncated length, tokens", y_label="pass@1, %")  # fmt: skip
