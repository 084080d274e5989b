"""How well the length of an answer is known before its first token (section 3.4, Eq. 13-15 and Appendix F)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lenvm.evaluation.metrics import Floats


def return_consistent_length(lengths: ArrayLike, gamma: float) -> Floats:
    """L_GT = ln(1 - mean u) / ln gamma with u = 1 - gamma^L, Eq. 13 and 14: what inverting a perfect value gives.

    Written as a log-sum-exp, so that gamma^L may underflow.

    Args:
        lengths: [..., N] L of N completions of the same prompt.
        gamma: the checkpoint's discount.

    Returns:
        [...] tokens; never above the plain mean (Appendix F).
    """
    nats = -np.asarray(lengths, dtype=np.float64) * -math.log(gamma)
    shift = nats.max(axis=-1, keepdims=True)
    log_mean = np.log(np.exp(nats - shift).mean(axis=-1)) + shift[..., 0]
    return np.asarray(log_mean / math.log(gamma))


def relative_error(predicted: ArrayLike, true: ArrayLike) -> Floats:
    """Signed (predicted - true) / true, one a prompt. Its mean absolute value is MRE, Eq. 15; its mean is the bias."""
    truth = np.asarray(true, dtype=np.float64)
    return np.asarray((np.asarray(predicted, dtype=np.float64) - truth) / truth)


def sampling_noise(lengths: Sequence[ArrayLike], gamma: float | None, resamples: int = 400, seed: int = 0) -> Floats:
    """The relative error that even a perfect predictor shows, because the truth is estimated from N completions.

    Each prompt's N lengths are resampled with replacement; how far the estimate moves is how far it lies from the
    truth. (A split-half estimate agrees: halves differ by twice as much.)

    Args:
        lengths: for each of P prompts the L of its N completions.
        gamma: for the noise of L_GT; None for the noise of the plain mean.
        resamples: bootstrap draws a prompt.
        seed: of the draws.

    Returns:
        [P] mean absolute relative error.
    """
    rng = np.random.default_rng(seed)
    noise = np.empty(len(lengths))
    for i, values in enumerate(lengths):
        row = np.asarray(values, dtype=np.float64)
        draws = row[rng.integers(0, len(row), size=(resamples, len(row)))]
        moved = draws.mean(-1) if gamma is None else return_consistent_length(draws, gamma)
        truth = row.mean() if gamma is None else return_consistent_length(row, gamma)
        noise[i] = np.abs(relative_error(moved, truth)).mean()
    return noise


def leave_one_out_mean(truth: ArrayLike) -> Floats:
    """For each prompt the mean over all *other* prompts: the prediction of someone who never looks at the prompt.

    Raises:
        ValueError: for fewer than two prompts.
    """
    values = np.asarray(truth, dtype=np.float64)
    if values.size < 2:
        raise ValueError(f"predicting the mean of the other prompts needs at least 2 prompts, got {values.size}.")
    return np.asarray((values.sum() - values) / (values.size - 1))


def best_constant(truth: ArrayLike) -> float:
    """The single length with the smallest MRE over these prompts, known in hindsight: the median weighted by 1 / L."""
    values = np.sort(np.asarray(truth, dtype=np.float64))
    weight = np.cumsum(1.0 / values)
    return float(values[np.searchsorted(weight, weight[-1] / 2.0)])


def coverage(lengths: Sequence[ArrayLike], quantile: ArrayLike) -> Floats:
    """Share of each prompt's completions at or below its predicted quantile; its mean over prompts should be p.

    Args:
        lengths: for each of P prompts the L of its completions.
        quantile: [P] predicted p-quantile in tokens.

    Returns:
        [P] shares.
    """
    return np.array([np.mean(np.asarray(row) <= q) for row, q in zip(lengths, np.asarray(quantile), strict=True)])
