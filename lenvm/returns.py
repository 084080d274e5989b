"""Bootstrapped targets: the lambda-return of GAE along each completion, vectorised (section 2.3).

GAE's target V(s_t) + sum_k (gamma lambda)^k delta_{t+k} obeys the backward recursion

    G_t = r + gamma ((1 - lambda) V(s_{t+1}) + lambda G_{t+1}),        r = -(1 - gamma).

Here everything is written for y = 1 + G and s = 1 + V = sigmoid(-z), where the reward drops out and nothing cancels:

    y_t = gamma ((1 - lambda) s_{t+1} + lambda y_{t+1}).

The recursion starts at the last state that was fed. Of a finished completion its remaining length n is known (n = 1
unless the sequence was cut at the cutoff), so y = gamma^n exactly, and lambda = 1 is the closed form at every state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lenvm.definitions import decay_nats


def same_completion(mask: Tensor, completion: Tensor | None) -> Tensor:
    """Whether a position and the next one are states of the same completion.

    Args:
        mask: [B, T] bool, the target states.
        completion: [B, T] int64 number of the completion in its row; None where a row is one completion.

    Returns:
        [B, T - 1] bool.
    """
    both = mask[:, :-1] & mask[:, 1:]
    return both if completion is None else both & (completion[:, :-1] == completion[:, 1:])


def reverse_scan(added: Tensor, factor: Tensor) -> Tensor:
    """y_t = added_t + factor_t y_{t+1} with y = 0 behind the end, by doubling: log2(T) passes, each composing a step
    with the one as long again behind it.

    Args:
        added: [B, T].
        factor: [B, T]; 0 where a row's sequence ends.

    Returns:
        [B, T].
    """
    y, step = added, 1
    while step < y.shape[1]:
        y = y + torch.cat([factor[:, :-step] * y[:, step:], torch.zeros_like(y[:, :step])], dim=1)
        factor = torch.cat([factor[:, :-step] * factor[:, step:], torch.zeros_like(y[:, :step])], dim=1)
        step *= 2
    return y


def lambda_returns(
    z: Tensor,
    remaining: Tensor,
    mask: Tensor,
    censored: Tensor,
    gamma: float,
    lam: float,
    bootstrap: bool,
    completion: Tensor | None = None,
) -> Tensor:
    """1 + G of every target state, with the model's own values as constants.

    A censored completion's remaining lengths are lower bounds. With `bootstrap` its recursion starts at the model's own
    value of the last state, or at the bound where that value predicts less than was seen; without, each of its states
    keeps the one-sided closed form: its own value where that is far enough, else the bound.

    Args:
        z: [B, T] value logits; no gradient flows through them.
        remaining: [B, T] tokens to come; any value off target.
        mask: [B, T] bool, the target states; the states of one completion are neighbours.
        censored: [B, T] bool.
        gamma: discount per token.
        lam: lambda in [0, 1].
        bootstrap: treatment of censored completions, as above.
        completion: [B, T] number of the completion in its row; None where a row is one completion.

    Returns:
        [B, T] in the dtype of z; meaningless off target.
    """
    own = torch.sigmoid(-z.detach())
    closed = torch.exp(torch.where(mask, remaining, 1).to(own.dtype) * -decay_nats(gamma))
    bound = torch.minimum(own, closed)  # one-sided: 1 + V may not be larger than 1 + G
    end = torch.where(censored, bound, closed)
    goes_on = torch.zeros_like(mask)
    goes_on[:, :-1] = same_completion(mask, completion)
    after = torch.cat([own[:, 1:], own[:, -1:]], dim=1)
    y = torch.where(goes_on, gamma * (1.0 - lam) * after, end)
    factor = torch.where(goes_on, torch.full_like(y, gamma * lam), torch.zeros_like(y))
    y = reverse_scan(y, factor)
    return y if bootstrap else torch.where(censored, bound, y)
