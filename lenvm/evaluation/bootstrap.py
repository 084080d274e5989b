"""Confidence intervals that respect that several completions belong to one prompt.

Completions of one prompt resemble each other, so the **prompt** is the unit that is resampled: a replicate draws as
many prompts as there are, with replacement, and takes all completions of each. Percentile intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from lenvm.evaluation.metrics import Floats

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
        n: completions behind it.
        prompts: prompts (clusters) behind it.
    """

    value: float
    low: float
    high: float
    n: int
    prompts: int

    def scaled(self, factor: float) -> Interval:
        """The same in another unit, e.g. per cent."""
        ends = sorted((self.low * factor, self.high * factor))
        return Interval(self.value * factor, ends[0], ends[1], self.n, self.prompts)


@dataclass(frozen=True)
class Clustered:
    """Values with the prompt each belongs to.

    Raises:
        ValueError: if the lists differ in length.
    """

    values: Sequence[float] | Floats
    prompts: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.prompts):
            raise ValueError(
                f"one prompt a value is needed, got {len(self.values)} values, {len(self.prompts)} prompts."
            )

    def sums(self, order: dict[str, int]) -> tuple[Floats, Floats]:
        """Per-prompt sums and counts, [prompts] each, in the order given."""
        index = np.array([order[p] for p in self.prompts], dtype=np.int64)
        total = np.bincount(index, weights=np.asarray(self.values, dtype=np.float64), minlength=len(order))
        return total.astype(np.float64), np.bincount(index, minlength=len(order)).astype(np.float64)


def mean_interval(values: ArrayLike, prompts: Sequence[str], seed: int = 0) -> Interval | None:
    """Mean over completions with a clustered bootstrap interval; None where there are no values."""
    data = Clustered(np.asarray(values, dtype=np.float64), prompts)
    if not len(data.values):
        return None
    order = _order(prompts)
    means = _replicate_means(data, order, replicate_weights(len(order), seed))
    value = float(np.mean(np.asarray(data.values)))
    low, high = interval_ends(means)
    return Interval(value, low, high, len(data.values), len(order))


def share_interval(hits: ArrayLike, prompts: Sequence[str], seed: int = 0) -> Interval | None:
    """Share of completions that are hits (true / 1), with its interval; None where there are none.

    If all or none are hits the bootstrap is blind; then the open end is the exact bound (alpha / 2)^(1 / prompts), as
    if each prompt were one trial.
    """
    found = mean_interval(hits, prompts, seed)
    if found is None or found.value not in (0.0, 1.0):
        return found
    bound = ((1.0 - LEVEL) / 2.0) ** (1.0 / found.prompts)
    low, high = (bound, 1.0) if found.value == 1.0 else (0.0, 1.0 - bound)
    return Interval(found.value, low, high, found.n, found.prompts)


def difference_interval(a: Clustered, b: Clustered, seed: int = 0) -> Interval | None:
    """mean(a) - mean(b), both resampled with the same prompts (paired); None where either is empty."""
    return _pair(a, b, seed, ratio=False)


def ratio_interval(a: Clustered, b: Clustered, seed: int = 0) -> Interval | None:
    """mean(a) / mean(b), both resampled with the same prompts; None where either is empty or mean(b) is 0."""
    return _pair(a, b, seed, ratio=True)


def group_intervals(values: ArrayLike, prompts: Sequence[str], groups: Sequence[str]) -> dict[str, Interval]:
    """Mean of each group with its interval; all groups share the replicates of the prompts.

    Args:
        values: [N].
        prompts: [N] the prompt of each value; prompts are what is resampled.
        groups: [N] the group of each value; a prompt may have values in many.

    Returns:
        group -> interval, in the order in which groups appear.
    """
    numbers = np.asarray(values, dtype=np.float64)
    prompt_order, group_order = _order(prompts), _order(groups)
    rows = np.array([prompt_order[p] for p in prompts], dtype=np.int64)
    columns = np.array([group_order[g] for g in groups], dtype=np.int64)
    shape = (len(prompt_order), len(group_order))
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (rows, columns), numbers)
    np.add.at(count, (rows, columns), 1.0)
    weights = replicate_weights(shape[0])
    found: dict[str, Interval] = {}
    for start in range(0, shape[1], 256):  # a few megabytes of replicates at a time
        part = slice(start, start + 256)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = (weights @ total[:, part]) / (weights @ count[:, part])
        for name, column, i in zip(list(group_order)[part], draws.T, range(start, shape[1]), strict=False):
            low, high = interval_ends(column)
            n, clusters = int(count[:, i].sum()), int((count[:, i] > 0).sum())
            found[name] = Interval(float(total[:, i].sum() / n), low, high, n, clusters)
    return found


def _pair(a: Clustered, b: Clustered, seed: int, *, ratio: bool) -> Interval | None:
    if not len(a.values) or not len(b.values):
        return None
    order = _order([*a.prompts, *b.prompts])
    weights = replicate_weights(len(order), seed)
    first, second = _replicate_means(a, order, weights), _replicate_means(b, order, weights)
    mean_a, mean_b = float(np.mean(np.asarray(a.values))), float(np.mean(np.asarray(b.values)))
    if ratio and mean_b == 0.0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = first / second if ratio else first - second
    low, high = interval_ends(draws)
    return Interval(mean_a / mean_b if ratio else mean_a - mean_b, low, high, len(a.values), len(order))


def _order(prompts: Sequence[str]) -> dict[str, int]:
    return {p: i for i, p in enumerate(dict.fromkeys(prompts))}


@lru_cache(maxsize=8)
def replicate_weights(clusters: int, seed: int = 0) -> Floats:
    """How often each prompt is in each replicate, [RESAMPLES, clusters]; read-only, as it is kept for the next call."""
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(clusters, np.full(clusters, 1.0 / clusters), size=RESAMPLES).astype(np.float64)
    weights.setflags(write=False)
    return weights


def _replicate_means(data: Clustered, order: dict[str, int], weights: Floats) -> Floats:
    total, count = data.sums(order)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((weights @ total) / (weights @ count))


def interval_ends(draws: Floats) -> tuple[float, float]:
    """Both ends of the 95 % interval of an estimate's replicates; replicates that are not finite are left out."""
    finite = draws[np.isfinite(draws)]  # a replicate may hold no prompt of one side
    if not len(finite):
        return float("nan"), float("nan")
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(finite, [tail, 1.0 - tail])
    return float(low), float(high)
