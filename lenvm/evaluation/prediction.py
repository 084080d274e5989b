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


def leave_one_out_domain_mean(truth: ArrayLike, domains: Sequence[str]) -> Floats:
    """For each prompt the mean over the other prompts of its domain: somebody who knows the domain and nothing else.

    Raises:
        ValueError: for a domain with a single prompt.
    """
    values = np.asarray(truth, dtype=np.float64)
    found = np.empty_like(values)
    for domain in dict.fromkeys(domains):
        here = np.array([d == domain for d in domains])
        if here.sum() < 2:
            raise ValueError(f"the domain {domain!r} has one prompt; its mean without that prompt does not exist.")
        found[here] = leave_one_out_mean(values[here])
    return found


def leave_one_out_regression(truth: ArrayLike, prompt_lengths: ArrayLike) -> Floats:
    """For each prompt the prediction of ln L = a + b ln(prompt tokens), fitted to all *other* prompts.

    In closed form: leaving one row of a least-squares fit out changes its residual to r / (1 - h), h its leverage.

    Args:
        truth: [P] lengths in tokens, > 0.
        prompt_lengths: [P] prompt tokens, >= 1.

    Raises:
        ValueError: for fewer than four prompts.
    """
    y = np.log(np.asarray(truth, dtype=np.float64))
    x = np.log(np.asarray(prompt_lengths, dtype=np.float64))
    if y.size < 4:
        raise ValueError(f"a regression that leaves one prompt out needs at least 4 prompts, got {y.size}.")
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ y) / spread if spread > 0 else 0.0
    leverage = 1.0 / y.size + (centred**2 / spread if spread > 0 else 0.0)
    residual = y - y.mean() - slope * centred
    return np.asarray(np.exp(y - residual / (1.0 - leverage)))


def survival_mean(lengths: Sequence[ArrayLike], own: int, reached: ArrayLike) -> Floats:
    """Mean remaining length of the other prompts' completions that got so far: E[L - t | L > t], without the prompt.

    Args:
        lengths: for each of P prompts the L of its completions.
        own: the prompt that is left out.
        reached: [T] tokens already written, t.

    Returns:
        [T] tokens; 1 where no other completion was longer.
    """
    others = np.sort(np.concatenate([np.asarray(row, dtype=np.float64) for i, row in enumerate(lengths) if i != own]))
    tail = np.concatenate([np.cumsum(others[::-1])[::-1], [0.0]])
    t = np.asarray(reached, dtype=np.float64)
    first = np.searchsorted(others, t, side="right")  # completions longer than t begin here
    count = others.size - first
    return np.asarray(np.where(count > 0, tail[first] / np.maximum(count, 1) - t, 1.0))


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
