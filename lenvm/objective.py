"""The training objective: Eq. 9 on the value, cross-entropy on the length distribution.

Functions return **sums** over the target positions they are given. The caller divides by the number of target
tokens of the whole optimizer step (all ranks, all accumulation steps), so that no mean of means can creep in.

A completion that was cut before its stop token is *censored*: its remaining length is only known to be at least
`remaining`, and it is never trained as if it had ended there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lenvm.bins import LengthBins
from lenvm.definitions import decay_nats


def value_loss_sum(z: Tensor, remaining: Tensor, censored: Tensor, gamma: float) -> Tensor:
    """Sum of squared errors (V - G)^2 (Eq. 9's numerator).

    V - G = sigmoid(-z) - gamma^n, which keeps its digits at both ends. A censored position is one-sided: G is at
    most -(1 - gamma^n), so only V above that costs.

    Args:
        z: [M] float32 logits at the target positions.
        remaining: [M] tokens to come; for a censored position the least that is possible.
        censored: [M] bool.
        gamma: discount per token.

    Returns:
        scalar float32.
    """
    error = torch.sigmoid(-z.float()) - torch.exp(remaining.float() * -decay_nats(gamma))
    error = torch.where(censored, error.clamp(min=0.0), error)
    return error.square().sum()


def length_nll_sum(length_logits: Tensor, remaining: Tensor, censored: Tensor, bins: LengthBins) -> Tensor:
    """Sum of -log q(n | s), two-hot, and of -log P(n >= remaining) at censored positions.

    Args:
        length_logits: [M, B] float32.
        remaining: [M] tokens to come; for a censored position the least that is possible.
        censored: [M] bool.
        bins: the bins.

    Returns:
        scalar float32.
    """
    log_q = torch.log_softmax(length_logits.float(), dim=-1)
    low, high, weight = bins.two_hot(remaining)
    finished = torch.lerp(log_q.gather(-1, low[:, None])[:, 0], log_q.gather(-1, high[:, None])[:, 0], weight)
    survival = bins.log_survival(log_q, remaining)
    return -torch.where(censored, survival, finished).sum()
