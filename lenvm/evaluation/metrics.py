"""Measures of one completion or of a set of them, as pure numpy functions.

Lengths count the stop token (L equals `usage.completion_tokens`), targets are lengths in the same unit. Every
per-completion function returns one number a completion, so that intervals can be resampled by prompt afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Mode = Literal["equal_to", "at_most", "at_least"]
Floats = NDArray[np.float64]
MODES: tuple[Mode, ...] = ("equal_to", "at_most", "at_least")
UNDER_PENALTY = 5.0
"""k1 of Eq. 18: how fast the score falls when the answer is too short."""
OVER_PENALTY = 2.0
"""k2 of Eq. 18: how fast it falls when the answer is too long."""


def length_deviation(length: ArrayLike, target: ArrayLike) -> Floats:
    """LD = (L - T) / T, Eq. 17; signed, 0.1 is ten per cent too long.

    Args:
        length: L in tokens, any shape.
        target: T in tokens, >= 1, broadcast against `length`.

    Raises:
        ValueError: if a target is smaller than 1.
    """
    lengths, targets = np.asarray(length, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if targets.size and targets.min() < 1:
        raise ValueError(f"length targets are at least 1 token, got {targets.min():g}.")
    return np.asarray((lengths - targets) / targets)


def length_score(length: ArrayLike, target: ArrayLike, mode: Mode = "equal_to") -> Floats:
    """Length Score in [0, 100], Eq. 18: 100 exp(5 LD) below the target, 100 exp(-2 LD) above it.

    `at_most` gives 100 to everything at or below the target, `at_least` to everything at or above it.

    Raises:
        ValueError: for a mode that does not exist.
    """
    deviation = length_deviation(length, target)
    _check_mode(mode)
    score = np.full(deviation.shape, 100.0)
    if mode != "at_most":
        score = np.where(deviation < 0, 100.0 * np.exp(UNDER_PENALTY * np.minimum(deviation, 0.0)), score)
    if mode != "at_least":
        score = np.where(deviation > 0, 100.0 * np.exp(-OVER_PENALTY * np.maximum(deviation, 0.0)), score)
    return score


def released_score(length: ArrayLike, target: ArrayLike, mode: Mode = "equal_to") -> Floats:
    """Length Score as the script released with LIFEBench computes it: the deviation enters Eq. 18 as a **percentage**.

    One per cent too short costs exp(-5), so this is close to the share of exact hits. Print it beside `length_score`
    when comparing with figures that were made with that script.

    Raises:
        ValueError: for a mode that does not exist.
    """
    deviation = 100.0 * length_deviation(length, target)
    _check_mode(mode)
    score = 100.0 * np.exp(np.where(deviation < 0, UNDER_PENALTY * deviation, -OVER_PENALTY * deviation))
    free = {"equal_to": deviation == 0, "at_most": deviation <= 0, "at_least": deviation >= 0}[mode]
    return np.asarray(np.where(free, 100.0, score))


def kept(length: ArrayLike, target: ArrayLike, mode: Mode, ended: ArrayLike = True) -> NDArray[np.bool_]:
    """Whether the constraint holds: L = T, L <= T or L >= T. For `equal_to` this is the exact hit.

    An answer that max_tokens cut has no length yet; it keeps nothing but a bound from below.

    Args:
        length: L in tokens, any shape.
        target: T in tokens.
        mode: the constraint.
        ended: whether the answer ended with its stop token.

    Raises:
        ValueError: for a mode that does not exist.
    """
    _check_mode(mode)
    lengths, targets = np.asarray(length), np.asarray(target)
    if mode == "equal_to":
        return np.asarray((lengths == targets) & np.asarray(ended))
    if mode == "at_most":
        return np.asarray((lengths <= targets) & np.asarray(ended))
    return np.asarray(lengths >= targets)


def repetition(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that repeat an earlier one: 1 - distinct / all; 0 for fewer than n tokens."""
    total = len(token_ids) - n + 1
    if total < 1:
        return 0.0
    grams = {tuple(token_ids[i : i + n]) for i in range(total)}
    return 1.0 - len(grams) / total


_CLOSING = "\"'”’»）)]}】》*_`~"
_ENDING = ".!?…。！？；"


def cut_sentence(text: str) -> bool:
    """Whether a text ends in the middle of a sentence: its last character, closing quotes, brackets and Markdown marks
    left aside, is no sentence's end (. ! ? … and their full-width forms). An empty text is cut.

    It is a measure to compare controllers by: a base model that ends answers without a full stop counts as cutting.
    """
    ending = text.rstrip()
    while ending and ending[-1] in _CLOSING:
        ending = ending[:-1].rstrip()
    return not ending or ending[-1] not in _ENDING


def hard_cut(lengths: ArrayLike, correct: ArrayLike, budget: float) -> tuple[Floats, Floats]:
    """Cutting every answer at `budget` tokens: what it costs and what survives.

    The rule of section 3.3: a longer answer is cut and counts as wrong, its length is the budget.

    Args:
        lengths: L in tokens, any shape.
        correct: whether the whole answer is right, same shape.
        budget: B in tokens.

    Returns:
        truncated lengths min(L, B) and correctness after the cut (1.0 / 0.0), both shaped like `lengths`.
    """
    length, right = np.asarray(lengths, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    return np.minimum(length, budget), np.where(length <= budget, right, 0.0)


def pass_at_k(samples: int, correct: ArrayLike, k: int) -> Floats:
    """Probability that one of k answers is right, from n drawn: 1 - C(n - c, k) / C(n, k), which is unbiased.

    Written as a product of k factors, so that nothing overflows.

    Args:
        samples: n answers of each problem.
        correct: c right ones of each problem, [P].
        k: 1 <= k <= n.

    Raises:
        ValueError: if k is out of its range.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@k needs 1 <= k <= {samples} drawn answers, got {k}.")
    wrong = samples - np.asarray(correct, dtype=np.float64)[..., None]
    drawn = np.arange(k, dtype=np.float64)
    return np.asarray(1.0 - np.prod(np.maximum(wrong - drawn, 0.0) / (samples - drawn), axis=-1))


def hard_cut_curve(lengths: ArrayLike, correct: ArrayLike, points: int = 60) -> tuple[Floats, Floats, Floats]:
    """Accuracy against mean truncated length for every budget, pooled over all answers.

    Args:
        lengths: L in tokens, any shape.
        correct: same shape.
        points: at most this many budgets, spread over the quantiles of `lengths`.

    Returns:
        budgets, mean truncated lengths, accuracies; each [<= points], increasing in the budget.
    """
    length = np.asarray(lengths, dtype=np.float64).ravel()
    budgets = np.unique(np.quantile(length, np.linspace(0.0, 1.0, points), method="inverted_cdf"))
    cuts = [hard_cut(length, np.asarray(correct).ravel(), b) for b in budgets]
    return budgets, np.array([c[0].mean() for c in cuts]), np.array([c[1].mean() for c in cuts])


def accuracy_at_length(mean_lengths: ArrayLike, accuracies: ArrayLike, mean_length: float) -> float:
    """Read a curve of `hard_cut_curve` at a given mean length, linearly between its points; from (0, 0) to its end."""
    x = np.concatenate([[0.0], np.asarray(mean_lengths, dtype=np.float64)])
    y = np.concatenate([[0.0], np.asarray(accuracies, dtype=np.float64)])
    return float(np.interp(mean_length, x, y))


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"unknown length mode {mode!r}; allowed are {', '.join(MODES)}.")
