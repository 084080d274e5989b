"""The length value model's definitions as pure functions.

A completion has L tokens, the stop token included. State s_t is the prompt and the first t completion tokens, so
n = L - t tokens are still to come. Everything downstream works with the **logit** z of the value head and with
lengths in **nats**, n * |ln gamma|, because 1 + V = sigmoid(-z) = exp(-softplus(z)) is exact at both ends, while
V = -sigmoid(z) itself loses the tail to rounding (bfloat16 V is useless beyond z = 6).

Functions take tensors of any shape and keep shape, dtype and device; none synchronises with the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "decay_nats",
    "discounted_return",
    "gamma_from_lengths",
    "length_from_logit",
    "logit_from_length",
    "target_nats",
    "td_residual",
    "value_from_logit",
]


def decay_nats(gamma: float) -> float:
    """|ln gamma|: how many nats one token is worth.

    Raises:
        ValueError: if gamma is not strictly between 0 and 1.
    """
    if not 0.0 < gamma < 1.0:
        raise ValueError(f"gamma must be strictly between 0 and 1, got {gamma!r}; the paper uses 0.997 and 0.9998.")
    return -math.log(gamma)


def discounted_return(remaining: Tensor, gamma: float) -> Tensor:
    """Return of a state with `remaining` tokens to come: G = -(1 - gamma^n), Eq. 2 and 10.

    Args:
        remaining: n >= 0 in tokens, any shape; integers are converted to the default float dtype.
        gamma: discount per token.

    Returns:
        G in (-1, 0], same shape; 0 exactly where n = 0 (the state after the stop token).
    """
    n = remaining if remaining.is_floating_point() else remaining.to(torch.get_default_dtype())
    return torch.expm1(n * -decay_nats(gamma))


def value_from_logit(z: Tensor) -> Tensor:
    """V = -sigmoid(z) in (-1, 0), Eq. 8."""
    return -torch.sigmoid(z)


def length_from_logit(z: Tensor, gamma: float) -> Tensor:
    """Predicted remaining length in tokens: n_hat = softplus(z) / |ln gamma|, Eq. 5 without its rounding.

    This inverts E[1 - gamma^n] and therefore underestimates E[n] (the paper's Appendix F); take the expected length
    from the length distribution where the checkpoint has one.
    """
    return F.softplus(z) / decay_nats(gamma)


def target_nats(remaining: Tensor, gamma: float) -> Tensor:
    """A remaining length of n tokens in nats, n * |ln gamma|: what softplus(z) should be."""
    return remaining * decay_nats(gamma)


def logit_from_length(remaining: Tensor, gamma: float) -> Tensor:
    """The logit z whose predicted length is n: the inverse of `length_from_logit`; -inf at n = 0.

    z = ln(e^a - 1) with a = n |ln gamma|, written as a + ln(1 - e^-a), which neither overflows nor cancels.
    """
    a = target_nats(remaining.to(torch.get_default_dtype()) if not remaining.is_floating_point() else remaining, gamma)
    return a + torch.log(-torch.expm1(-a))


def gamma_from_lengths(lengths: Iterable[float], quantile: float = 0.99, residual: float = 0.01) -> float:
    """`gamma: auto`, section 4.3: the gamma at which a completion of the 99th percentile's length has
    gamma^L99 = 0.01, so that the sigmoid resolves nearly every length that occurs.

    Args:
        lengths: L of each training completion in tokens (stop token included), all >= 1.
        quantile: which completion the horizon is fitted to.
        residual: what is left of 1 + V at that length.

    Raises:
        ValueError: if there are no lengths or one is smaller than 1.
    """
    values = torch.as_tensor(list(lengths), dtype=torch.float64)
    if values.numel() == 0:
        raise ValueError("gamma cannot be fitted to an empty sample of lengths; give at least one completion.")
    if values.min() < 1:
        raise ValueError(f"completion lengths count the stop token and are at least 1, got {values.min().item():g}.")
    # sort rather than torch.quantile, which refuses inputs of more than 2^24 elements
    ordered = values.sort().values
    position = quantile * (ordered.numel() - 1)
    low = int(position)
    high = min(low + 1, ordered.numel() - 1)
    longest = (ordered[low] + (position - low) * (ordered[high] - ordered[low])).item()
    return residual ** (1.0 / longest)


def td_residual(values: Tensor, gamma: float) -> Tensor:
    """TD residual of each generated token, delta_t = r_t + gamma V(s_{t+1}) - V(s_t), r_t = -(1 - gamma), Eq. 1 and 3.

    Negative: the token made the answer longer than the state before it expected; positive: shorter.

    Args:
        values: [..., L] V(s_0) .. V(s_{L-1}). V(s_L) = 0 by definition (the state after the stop token).

    Returns:
        [..., L], delta_t belongs to completion token t + 1 (counted from 1).
    """
    after = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)
    return gamma * after - values - (1.0 - gamma)
