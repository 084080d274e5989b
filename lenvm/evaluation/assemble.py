"""From answers to tables: every figure of results.json with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lenvm.evaluation.bootstrap import (
    Clustered,
    Interval,
    difference_interval,
    mean_interval,
    ratio_interval,
    share_interval,
)
from lenvm.evaluation.client import Answer
from lenvm.evaluation.data import NaturalData, NaturalPrompt
from lenvm.evaluation.metrics import (
    MODES,
    Mode,
    accuracy_at_length,
    cut_sentence,
    hard_cut,
    hard_cut_curve,
    kept,
    length_deviation,
    length_score,
    released_score,
    repetition,
)
from lenvm.evaluation.plan import BASE, CONTROLLERS, IN_MODE, SIDE, Controller
from lenvm.evaluation.schema import (
    ControlRow,
    CurvePoint,
    Estimate,
    HardCutCurve,
    MedianRow,
    NaturalSummary,
    TradeOff,
)

Prompts = Mapping[str, NaturalPrompt]
PLAUSIBLE_STOP = 0.01
"""Base probability from which a stop token at a strict bound counts as natural."""


class TextScore(NamedTuple):
    """Base log-probability of a text: mean a token, and of its last token (the stop token, where it stopped)."""

    mean: float
    last: float


LogProbs = Mapping[str, TextScore]
"""Scores of the answers by request key."""


def natural_summary(data: NaturalData) -> NaturalSummary:
    """Lengths and accuracy of the base's own samples."""
    lengths = np.concatenate([p.lengths for p in data.prompts])
    cut = [s.finish_reason != "stop" for p in data.prompts for s in p.samples]
    correct = base_accuracy(data)
    return NaturalSummary(
        prompts=len(data.prompts),
        problems=len(data.problems),
        samples=len(lengths),
        censored=100.0 * float(np.mean(cut)),
        mean_length=float(lengths.mean()),
        percentiles={f"p{q}": float(np.percentile(lengths, q)) for q in (5, 25, 50, 75, 95, 99)},
        accuracy=Estimate.of(share_interval(correct.values, correct.prompts), 100.0),
        lengths=np.bincount(lengths).tolist(),
    )


def base_accuracy(data: NaturalData) -> Clustered:
    """Whether each of the base's own completions of a problem is right, by problem."""
    values = [v for p in data.problems for v in p.correct()]
    return Clustered(values, [p.id for p in data.problems for _ in p.samples])


def control_rows(
    answers: Sequence[Answer], prompts: Prompts, log_probs: LogProbs
) -> tuple[list[ControlRow], list[ControlRow]]:
    """The main table (every mode and controller) and the side table (other controllers under equal_to).

    Args:
        answers: of the whole plan.
        prompts: by id.
        log_probs: of every answer that was scored.

    Returns:
        rows in the order of `plan.IN_MODE`, and rows of `plan.SIDE` together with the default posterior and the base
        on the same pairs of prompt and target.
    """
    main, side = [], []
    for mode in MODES:
        of_mode = [a for a in answers if a.request.experiment == mode]
        base = [a for a in of_mode if a.request.controller == BASE.key]
        for controller in IN_MODE[mode]:
            chosen = [a for a in of_mode if a.request.controller == controller.key]
            if chosen:
                main.append(control_row(mode, controller, chosen, base, prompts, log_probs))
    pairs = {_pair(a) for a in answers if a.request.controller in {c.key for c in SIDE}}
    same = [a for a in answers if a.request.experiment == "equal_to" and _pair(a) in pairs]
    base = [a for a in same if a.request.controller == BASE.key]
    for key in ("base", "hard", "soft", "posterior_a1", "posterior", "posterior_a4"):
        chosen = [a for a in same if a.request.controller == key]
        if chosen:
            side.append(control_row("equal_to", CONTROLLERS[key], chosen, base, prompts, log_probs, points=False))
    return main, side


def _pair(answer: Answer) -> tuple[str, int]:
    return answer.request.prompt_id, answer.request.sample


def control_row(
    mode: str,
    controller: Controller,
    answers: Sequence[Answer],
    base: Sequence[Answer],
    prompts: Prompts,
    log_probs: LogProbs,
    points: bool = True,
) -> ControlRow:
    """One row of a control table: every score of a controller's answers under one mode, intervals by prompt.

    Args:
        mode: the constraint.
        controller: who answered.
        answers: its answers, at least one.
        base: the base model's answers to the same prompts and targets.
        prompts: by id.
        log_probs: of every answer that was scored.
        points: keep the pairs of asked and obtained tokens.
    """
    ids = [a.request.prompt_id for a in answers]
    lengths = np.array([a.length for a in answers])
    targets = np.array([a.request.target for a in answers])
    ended = np.array([a.finish_reason == "stop" for a in answers])
    scored = _clustered_log_probs(answers, log_probs)
    solved = [a for a in answers if prompts[a.request.prompt_id].answer is not None]
    right = [float(prompts[a.request.prompt_id].is_right(a.text, a.finish_reason)) for a in solved]
    return ControlRow(
        mode=mode,
        controller=controller.key,
        label=controller.label,
        length_score=_certain(mean_interval(length_score(lengths, targets, _mode(mode)), ids)),
        deviation=_certain(mean_interval(np.abs(length_deviation(lengths, targets)), ids), 100.0),
        kept=_certain(share_interval(kept(lengths, targets, _mode(mode), ended).astype(np.float64), ids), 100.0),
        natural_stops=_stops(answers, log_probs),
        base_log_prob=Estimate.of(mean_interval(scored.values, scored.prompts)),
        log_prob_difference=None
        if controller is BASE
        else Estimate.of(difference_interval(scored, _clustered_log_probs(base, log_probs))),
        repetition=_certain(mean_interval([repetition(a.token_ids) for a in answers], ids), 100.0),
        accuracy=Estimate.of(share_interval(right, [a.request.prompt_id for a in solved]), 100.0),
        mean_length=_certain(mean_interval(lengths.astype(np.float64), ids)),
        released_score=_certain(mean_interval(released_score(lengths, targets, _mode(mode)), ids)),
        cut_sentences=_certain(share_interval([float(cut_sentence(a.text)) for a in answers], ids), 100.0),
        points=[(int(t), int(n)) for t, n in zip(targets, lengths, strict=True)] if points else [],
    )


def natural_stop(answer: Answer, stop_log_prob: float) -> bool:
    """Whether the answer ended by itself.

    Without `length_strict` nothing is forced, and an answer that stopped stopped by itself. With it the end at the
    bound is forced; it counts as natural if the base model gives the stop token at least 1 % there.
    """
    if answer.finish_reason != "stop":
        return False
    return not answer.request.fields.get("length_strict", False) or stop_log_prob >= math.log(PLAUSIBLE_STOP)


def _stops(answers: Sequence[Answer], log_probs: LogProbs) -> Estimate | None:
    if any(a.request.key not in log_probs for a in answers):
        return None
    stops = [float(natural_stop(a, log_probs[a.request.key].last)) for a in answers]
    return Estimate.of(share_interval(stops, [a.request.prompt_id for a in answers]), 100.0)


def median_rows(answers: Sequence[Answer], data: NaturalData) -> list[MedianRow]:
    """Accuracy when each problem is asked for its natural median length, beside the base's own."""
    prompts = data.by_id
    base = base_accuracy(data)
    rows = []
    if len(base.values):
        own = share_interval(base.values, base.prompts)
        rows.append(
            MedianRow(
                controller="base",
                label="base model, unguided",
                accuracy=_certain(own, 100.0),
                difference=None,
                kept=None,
            )
        )
    for key in ("hard", "posterior"):
        chosen = [a for a in answers if (a.request.experiment, a.request.controller) == ("median", key)]
        if not chosen:
            continue
        right = _right(chosen, prompts)
        hits = [float(a.length == a.request.target and a.finish_reason == "stop") for a in chosen]
        rows.append(
            MedianRow(
                controller=key,
                label=CONTROLLERS[key].label,
                accuracy=_certain(share_interval(right.values, right.prompts), 100.0),
                difference=Estimate.of(difference_interval(right, base), 100.0),
                kept=Estimate.of(share_interval(hits, right.prompts), 100.0),
            )
        )
    return rows


def trade_off(answers: Sequence[Answer], data: NaturalData) -> TradeOff | None:
    """Accuracy against mean truncated length: budgets by posterior at_most, length_bias, and cutting.

    A budget cuts everybody alike: an answer longer than it counts as wrong and as long as the budget, whether it was
    guided or not (section 3.3).
    """
    if not data.problems:
        return None
    prompts = data.by_id
    base_right = base_accuracy(data)
    all_lengths = np.concatenate([p.lengths for p in data.problems]).astype(np.float64)
    all_right = np.asarray(base_right.values)
    budgets, lengths, accuracies = hard_cut_curve(all_lengths, all_right)

    def point(setting: float, label: str, length: Clustered, right: Clustered, over: Interval | None) -> CurvePoint:
        mean_length = _certain(mean_interval(length.values, length.prompts))
        return CurvePoint(
            setting=setting,
            label=label,
            mean_length=mean_length,
            accuracy=_certain(share_interval(right.values, right.prompts), 100.0),
            share_of_base=Estimate.of(ratio_interval(right, base_right), 100.0),
            overruns=Estimate.of(over, 100.0),
            hard_cut_accuracy=100.0 * accuracy_at_length(lengths, accuracies, mean_length.value),
        )

    at_most, cuts, biases = [], [], []
    for experiment, setting in dict.fromkeys((a.request.experiment, a.request.controller) for a in answers):
        if experiment not in ("budget", "bias"):
            continue
        chosen = [a for a in answers if (a.request.experiment, a.request.controller) == (experiment, setting)]
        right = _right(chosen, prompts)
        length = np.array([a.length for a in chosen], dtype=np.float64)
        if experiment == "bias":
            biases.append(
                point(float(setting), f"length_bias {setting}", Clustered(length, right.prompts), right, None)
            )
            continue
        limit = chosen[0].request.target
        assert limit is not None, "a budget request always carries a target"
        over = share_interval((length > limit).astype(np.float64), right.prompts)
        short, after = hard_cut(length, right.values, limit)
        at_most.append(
            point(limit, f"at_most {limit}", Clustered(short, right.prompts), Clustered(after, right.prompts), over)
        )
        short, after = hard_cut(all_lengths, all_right, limit)
        over = share_interval((all_lengths > limit).astype(np.float64), base_right.prompts)
        cuts.append(
            point(
                limit,
                f"cut at {limit}",
                Clustered(short, base_right.prompts),
                Clustered(after, base_right.prompts),
                over,
            )
        )
    return TradeOff(
        base_accuracy=_certain(share_interval(base_right.values, base_right.prompts), 100.0),
        base_mean_length=_certain(mean_interval(all_lengths, base_right.prompts)),
        budgets=sorted(at_most, key=lambda p: p.setting),
        biases=sorted(biases, key=lambda p: p.setting),
        hard_cuts=sorted(cuts, key=lambda p: p.setting),
        curve=HardCutCurve(
            budgets=budgets.tolist(), mean_lengths=lengths.tolist(), accuracies=(100.0 * accuracies).tolist()
        ),
    )


def _right(answers: Sequence[Answer], prompts: Prompts) -> Clustered:
    ids = [a.request.prompt_id for a in answers]
    return Clustered([float(prompts[a.request.prompt_id].is_right(a.text, a.finish_reason)) for a in answers], ids)


def _clustered_log_probs(answers: Sequence[Answer], log_probs: LogProbs) -> Clustered:
    scored = [a for a in answers if a.request.key in log_probs]
    return Clustered([log_probs[a.request.key].mean for a in scored], [a.request.prompt_id for a in scored])


def _certain(interval: Interval | None, factor: float = 1.0) -> Estimate:
    estimate = Estimate.of(interval, factor)
    assert estimate is not None, "called with at least one value"
    return estimate


def _mode(name: str) -> Mode:
    return next(m for m in MODES if m == name)
