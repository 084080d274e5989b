"""Length prediction (section 3.4, Table 3): at the prompt and along the answer, by domain, with baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lenvm.evaluation.bootstrap import mean_interval
from lenvm.evaluation.boundary import guesses, truth_of
from lenvm.evaluation.data import NaturalData, NaturalPrompt
from lenvm.evaluation.metrics import Floats
from lenvm.evaluation.outcome import Cell, Outcome, Plot, Series, Sheet, new_outcome
from lenvm.evaluation.prediction import coverage, relative_error, sampling_noise, survival_mean
from lenvm.evaluation.schema import Estimate
from lenvm.evaluation.scoring import PromptPrediction
from lenvm.evaluation.values import StateValues

POSITIONS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
"""Relative positions in an answer at which the remaining length is judged (section 4.3 takes four of them)."""
BINS = 10


class Course(NamedTuple):
    """One finished answer: which prompt, its L, and the LenVM's values at its L + 1 states."""

    prompt: int
    length: int
    values: StateValues


def finished_answers(prompts: Sequence[NaturalPrompt], per_prompt: int) -> list[tuple[int, int]]:
    """(prompt, sample) of the answers that are followed: the first so many of each prompt that ended by themselves."""
    found = []
    for i, prompt in enumerate(prompts):
        ended = [k for k, s in enumerate(prompt.samples) if s.finish_reason == "stop"]
        found += [(i, k) for k in ended[:per_prompt]]
    return found


def length_outcome(
    data: NaturalData, predicted: PromptPrediction, courses: Sequence[Course], parameters: dict[str, Any]
) -> Outcome:
    """Every table of length prediction.

    Args:
        data: [P] prompts with N samples each; `kind` is the domain.
        predicted: [P] predictions at the prompt.
        courses: answers that were followed, of the same prompts.
        parameters: recorded with the results.

    Raises:
        ValueError: for fewer than two prompts.
    """
    samples = [len(p.samples) for p in data.prompts]
    cut = float(np.mean([s.finish_reason != "stop" for p in data.prompts for s in p.samples]))
    progress, curve = _progressive(data.prompts, courses)
    return new_outcome(
        "length",
        "Length prediction",
        {"gamma": predicted.gamma, **parameters},
        summary=[
            f"{len(data.prompts)} prompts, {np.mean(samples):.0f} completions each on average; {100 * cut:.1f} % were "
            "cut by max_tokens and enter with the length they reached.",
            f"{len(courses)} finished answers were followed token by token.",
        ],
        sheets=[
            *_at_prompt(data.prompts, predicted),
            *([progress, _calibration(data.prompts, courses)] if courses else []),
            *([_coverage(data.prompts, predicted, courses)] if predicted.p50 is not None else []),
        ],
        plots=[_scatter(data.prompts, predicted), *([curve, _calibration_plot(courses)] if courses else [])],
    )


def _at_prompt(prompts: Sequence[NaturalPrompt], predicted: PromptPrediction) -> list[Sheet]:
    """Table 3, the same against the mean length, and the bias; a column a domain."""
    truth, mean = truth_of(prompts, predicted.gamma)
    domains = sorted({p.kind for p in prompts if p.kind})
    groups = [("all", np.ones(len(prompts), dtype=bool))]
    if len(domains) > 1:
        groups += [(d, np.array([p.kind == d for p in prompts])) for d in domains]

    def line(errors: Floats) -> list[Cell]:
        cells: list[Cell] = []
        for _, here in groups:
            ids = [p.id for p, k in zip(prompts, here, strict=True) if k]
            cells.append(Estimate.of(mean_interval(errors[here], ids), 100.0))
        return cells

    against_return: list[list[Cell]] = []
    against_mean: list[list[Cell]] = []
    bias: list[list[Cell]] = []
    for guess in guesses(prompts, predicted):
        against_return.append([guess.label, *line(np.abs(relative_error(guess.of_return, truth)))])
        if guess.of_mean is not None:
            signed = relative_error(guess.of_mean, mean)
            against_mean.append([guess.label, *line(np.abs(signed))])
            bias.append([guess.label, *line(signed)])
    lengths = [p.lengths for p in prompts]
    floor = "noise floor of the truth"
    against_return.append([floor, *line(sampling_noise(lengths, predicted.gamma))])
    against_mean.append([floor, *line(sampling_noise(lengths, None))])
    head = ["", *(name for name, _ in groups)]
    return [
        Sheet(title="Table 3: MRE at the prompt, % (Eq. 13-15)", head=head, rows=against_return,
              note="Against L_GT, the length that a perfect value would give. The floor is what N samples leave."),
        Sheet(title="MRE against the mean length, %", head=head, rows=against_mean,
              note="What a scheduler needs. Inverting the value underestimates it (Appendix F)."),
        Sheet(title="Bias against the mean length, %", head=head, rows=bias),
    ]  # fmt: skip


def _state(length: int, position: float) -> int:
    """Tokens written at a relative position: at least one remains."""
    return min(int(position * length), length - 1)


def _progressive(prompts: Sequence[NaturalPrompt], courses: Sequence[Course]) -> tuple[Sheet, Plot]:
    """Error of the predicted remaining length at relative positions, with what others that got so far had left."""
    ended = [p.ended_lengths for p in prompts]
    ids = [prompts[c.prompt].id for c in courses]
    rows: list[list[Cell]] = []
    errors: dict[str, list[Estimate]] = {"LenVM": [], "others that got so far": []}
    for position in POSITIONS:
        states = [_state(c.length, position) for c in courses]
        left = np.array([c.length - t for c, t in zip(courses, states, strict=True)], dtype=np.float64)
        own = np.array([c.values.remaining[t] for c, t in zip(courses, states, strict=True)])
        others = np.array([survival_mean(ended, c.prompt, [t])[0] for c, t in zip(courses, states, strict=True)])
        cells: list[Cell] = [f"{100 * position:.0f} %"]
        for name, guess in zip(errors, (own, others), strict=True):
            relative = Estimate.of(mean_interval(np.abs(relative_error(guess, left)), ids), 100.0)
            assert relative is not None, "called with courses"
            errors[name].append(relative)
            cells += [relative, Estimate.of(mean_interval(np.abs(guess - left), ids))]
        cells.append(Estimate.of(mean_interval(own - left, ids)))
        rows.append(cells)
    sheet = Sheet(
        title="Error along the answer",
        head=["written", "relative error %", "tokens", "others that got so far: %", "tokens", "bias, tokens"],
        rows=rows,
        note="Against one answer's own remaining length, which no predictor can know; the other column is the mean of "
        "all other prompts' answers that were longer than this state.",
    )
    x = [100 * p for p in POSITIONS]
    series = [
        Series(label=name, x=x, y=[e.value for e in found], y_low=[e.low for e in found],
               y_high=[e.high for e in found], colour=colour)
        for (name, found), colour in zip(errors.items(), ("posterior", "base"), strict=True)
    ]  # fmt: skip
    return sheet, Plot(name="progress", title="Error along the answer", series=series,
                       x_label="written, % of the answer", y_label="relative error, %")  # fmt: skip


def calibration_bins(courses: Sequence[Course]) -> list[tuple[Floats, Floats, list[int]]]:
    """All states sorted by predicted remaining length into deciles: (predicted, true, prompt) of each."""
    predicted = np.concatenate([c.values.remaining[:-1] for c in courses])
    true = np.concatenate([c.length - np.arange(c.length, dtype=np.float64) for c in courses])
    prompt = np.concatenate([np.full(c.length, c.prompt) for c in courses])
    order = np.argsort(predicted, kind="stable")
    return [(predicted[part], true[part], prompt[part].tolist()) for part in np.array_split(order, BINS) if len(part)]


def _calibration(prompts: Sequence[NaturalPrompt], courses: Sequence[Course]) -> Sheet:
    rows: list[list[Cell]] = []
    for i, (predicted, true, prompt) in enumerate(calibration_bins(courses)):
        ids = [prompts[p].id for p in prompt]
        ratio = 100.0 * (float(predicted.mean()) / float(true.mean()) - 1.0)
        rows.append([f"{i + 1}", float(predicted.mean()), Estimate.of(mean_interval(true, ids)), ratio, len(true)])
    return Sheet(
        title="Calibration by decile of the predicted remaining length",
        head=["decile", "predicted", "true", "off by %", "states"],
        rows=rows,
    )


def _calibration_plot(courses: Sequence[Course]) -> Plot:
    bins = calibration_bins(courses)
    series = Series(label="deciles", x=[float(p.mean()) for p, _, _ in bins], y=[float(t.mean()) for _, t, _ in bins])
    return Plot(name="calibration", title="Calibration", x_label="predicted remaining length, tokens",
                y_label="true, tokens", series=[series], diagonal=True, log=True)  # fmt: skip


def _coverage(prompts: Sequence[NaturalPrompt], predicted: PromptPrediction, courses: Sequence[Course]) -> Sheet:
    """Share of answers no longer than a predicted quantile, at the prompt and at all states."""
    lengths = [p.lengths for p in prompts]
    ids = [p.id for p in prompts]
    rows: list[list[Cell]] = []
    for name, level, at_prompt in (("p50", 50, predicted.p50), ("p90", 90, predicted.p90)):
        assert at_prompt is not None, "asked only where there is a length distribution"
        cells: list[Cell] = [f"{level} %", Estimate.of(mean_interval(coverage(lengths, at_prompt), ids), 100.0)]
        if courses:
            hits, where = [], []
            for c in courses:
                quantile = getattr(c.values, name)
                hits.append(c.length - np.arange(c.length) <= quantile[:-1])
                where += [prompts[c.prompt].id] * c.length
            cells.append(Estimate.of(mean_interval(np.concatenate(hits).astype(np.float64), where), 100.0))
        rows.append(cells)
    head = ["wanted", "at the prompt %", *(["at every state %"] if courses else [])]
    return Sheet(title="Coverage of the predicted quantiles", head=head, rows=rows)


def _scatter(prompts: Sequence[NaturalPrompt], predicted: PromptPrediction) -> Plot:
    truth, mean = truth_of(prompts, predicted.gamma)
    series = [
        Series(label="inverted value against L_GT", x=truth.tolist(), y=predicted.from_value.tolist(), style="points",
               colour="hard")
    ]  # fmt: skip
    if predicted.expected is not None:
        series.append(
            Series(label="E[L] against the mean length", x=mean.tolist(), y=predicted.expected.tolist(), style="points",
                   colour="posterior")
        )  # fmt: skip
    return Plot(name="scatter", title="Predicted at the prompt", x_label="true, tokens", y_label="predicted, tokens",
                series=series, diagonal=True, log=True)  # fmt: skip
