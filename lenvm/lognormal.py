"""A length distribution for checkpoints that have a value head only.

ln(n + 1/2) is taken as normal around ln(n_hat + 1/2) + shift, with a spread that depends on n_hat; both are fitted on
validation residuals and stored in the checkpoint (`lenvm.format.Spread`). Put on bins, it is used like the length
head's distribution everywhere.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lenvm.bins import LengthBins
from lenvm.definitions import decay_nats, length_from_logit
from lenvm.format import LenvmConfig, Spread

DEFAULT_SPREAD = Spread(log_n_hat=(0.0,), shift=(0.0,), sigma=(0.5,))
"""Used when a checkpoint carries no fitted spread (such as one converted from elsewhere)."""
MIN_SIGMA = 0.05


def fit_spread(n_hat: Tensor, n: Tensor, knots: int = 12) -> Spread:
    """Fit shift and spread of ln(n + 1/2) - ln(n_hat + 1/2) as functions of n_hat.

    Args:
        n_hat: [M] predicted remaining lengths in tokens at validation states of finished completions.
        n: [M] the true ones.
        knots: how many groups of equal size the residuals are split into (fewer where data are few).

    Raises:
        ValueError: if there are fewer than 2 states or the shapes differ.
    """
    if n_hat.shape != n.shape or n_hat.numel() < 2:
        raise ValueError(
            "fit_spread needs two equal-sized samples of at least 2 states, "
            f"got {tuple(n_hat.shape)} and {tuple(n.shape)}."
        )
    x = (n_hat.flatten().double() + 0.5).log()
    residual = (n.flatten().double() + 0.5).log() - x
    order = x.argsort()
    x, residual = x[order], residual[order]
    groups = max(1, min(knots, x.numel() // 20))
    centres: list[float] = []
    shifts: list[float] = []
    sigmas: list[float] = []
    for part_x, part_r in zip(x.tensor_split(groups), residual.tensor_split(groups), strict=True):
        centre = part_x.median().item()
        if centres and centre <= centres[-1]:  # many equal predictions: one knot is enough
            continue
        centres.append(centre)
        shifts.append(part_r.mean().item())
        sigmas.append(max(MIN_SIGMA, part_r.std(unbiased=False).item()))
    return Spread(log_n_hat=tuple(centres), shift=tuple(shifts), sigma=tuple(sigmas))


def lognormal_bins(gamma: float) -> LengthBins:
    """Bins for a value-only checkpoint: up to the length at which gamma^n = 1e-5, where the sigmoid is blind."""
    return _lognormal_bins(gamma)


@lru_cache(maxsize=8)
def _lognormal_bins(gamma: float) -> LengthBins:
    return LengthBins.for_max_length(max(2, math.ceil(math.log(1e5) / decay_nats(gamma))))


def lognormal_log_q(z: Tensor, lenvm: LenvmConfig) -> tuple[Tensor, LengthBins]:
    """Length distribution around the inverted value.

    Args:
        z: [...] float value logits.
        lenvm: gamma and the fitted spread.

    Returns:
        log_q [..., B] float32 log-probabilities over `lognormal_bins(gamma)`, and those bins.
    """
    bins = lognormal_bins(lenvm.gamma)
    tables = _tables(lenvm.gamma, lenvm.spread or DEFAULT_SPREAD, z.device)
    x = (length_from_logit(z.double(), lenvm.gamma) + 0.5).log()
    centre = x + _interpolate(x, tables.knots, tables.shift)
    sigma = _interpolate(x, tables.knots, tables.sigma)
    standard = (tables.log_edges - centre[..., None]) / sigma[..., None]
    low, high = standard[..., :-1], standard[..., 1:]
    # log(Phi(high) - Phi(low)), in whichever tail keeps the digits
    flip = low > 0
    a = torch.where(flip, torch.special.log_ndtr(-low), torch.special.log_ndtr(high))
    b = torch.where(flip, torch.special.log_ndtr(-high), torch.special.log_ndtr(low))
    log_q = a + torch.log(-torch.expm1((b - a).clamp(max=-1e-12)))
    # what lies below half a token belongs to the first bin
    return torch.log_softmax(log_q, -1).float(), bins


class _Tables(NamedTuple):
    """Constants of one checkpoint on one device, float64."""

    knots: Tensor
    shift: Tensor
    sigma: Tensor
    log_edges: Tensor  # [B + 1]


@cache  # not bounded: a CUDA graph goes on reading them
def _tables(gamma: float, spread: Spread, device: torch.device) -> _Tables:
    points = lognormal_bins(gamma).centre_tensor
    # a bin reaches to half way to its neighbours; n + 1/2 is the coordinate
    edges = torch.cat([torch.zeros_like(points[:1]), (points[1:] + points[:-1]) / 2, points[-1:] * 1e6]) + 0.5
    knots, shift, sigma = (torch.tensor(v, dtype=torch.float64) for v in (spread.log_n_hat, spread.shift, spread.sigma))
    return _Tables(*(t.to(device) for t in (knots, shift, sigma, edges.log())))


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), constant outside; [...] float64."""
    if values.numel() == 1:
        return values.expand(x.shape)
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, values.numel() - 1)
    weight = ((x - knots[right - 1]) / (knots[right] - knots[right - 1])).clamp(0, 1)
    return torch.lerp(values[right - 1], values[right], weight)
