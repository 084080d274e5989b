"""A LenVM as the value baseline of a length reward in policy-gradient training (the paper's Appendix C).

Column t of every tensor here is the action a_t, completion token t + 1, taken in state s_t: `values[:, t]` is V(s_t),
`mask[:, t]` whether the token exists. Rows may be padded on either side; a completion's tokens are neighbours. This is
the layout of `completion_ids` and `completion_mask` in TRL's trainers.

Nothing here synchronises with the host, and no gradient flows through the advantages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lenvm.definitions import decay_nats
from lenvm.returns import reverse_scan

__all__ = [
    "advantages",
    "combine",
    "length_advantages",
    "length_rewards",
    "state_values",
    "td_errors",
    "whiten",
]


def length_rewards(mask: Tensor, gamma: float) -> Tensor:
    """r_t = -(1 - gamma) for every token of a completion, Eq. 19; their discounted sum from t on is G_t.

    Args:
        mask: [B, T] bool, the completions' tokens.
        gamma: discount per token.

    Returns:
        [B, T] float32; 0 off the completions.

    Raises:
        ValueError: if gamma is not strictly between 0 and 1.
    """
    decay_nats(gamma)  # checks gamma
    return mask.float() * -(1.0 - gamma)


def state_values(z: Tensor, mask: Tensor, finished: Tensor) -> tuple[Tensor, Tensor]:
    """V(s_t) before each token, and V(s_L) behind the last one, from a LenVM's logits over prompt and completion.

    Args:
        z: [B, T] value logits at every position of the sequence (`LengthValueModel(...).z`).
        mask: [B, T] bool, the positions of completion tokens; never the first position, a prompt comes before.
        finished: [B] bool, whether the completion ended with its stop token.

    Returns:
        values [B, T], aligned with the tokens of `mask`, 0 elsewhere; and last [B], 0 where a completion is finished.

    Raises:
        ValueError: if the shapes differ.
    """
    if z.shape != mask.shape or finished.shape != z.shape[:1]:
        raise ValueError(
            f"z and mask must have one shape [B, T] and finished [B], got {tuple(z.shape)}, {tuple(mask.shape)} and "
            f"{tuple(finished.shape)}."
        )
    value = -torch.sigmoid(z.detach().float())
    # the state before a token is read at the position before it
    before = torch.cat([torch.zeros_like(value[:, :1]), value[:, :-1]], dim=1)
    last = (value * _ends(mask)).sum(1)
    return before * mask, torch.where(finished, torch.zeros_like(last), last)


def td_errors(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, last: Tensor | None = None) -> Tensor:
    """delta_t = r_t + gamma V(s_{t+1}) - V(s_t), Eq. 21 and 23.

    Args:
        rewards: [B, T].
        values: [B, T] V(s_t).
        mask: [B, T] bool.
        gamma: discount per token; a task may have another than the length, and 1.
        last: [B] V(s_L) of completions that were cut; None where all are finished, 0 for those that are.

    Returns:
        [B, T] in the dtype of `values`; 0 off the completions.

    Raises:
        ValueError: if gamma is not in (0, 1], or the shapes differ.
    """
    if not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma must be above 0 and at most 1, got {gamma!r}.")
    if rewards.shape != values.shape or values.shape != mask.shape:
        raise ValueError(
            f"rewards, values and mask must have one shape [B, T], got {tuple(rewards.shape)}, {tuple(values.shape)} "
            f"and {tuple(mask.shape)}."
        )
    values = values.detach()
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    end = torch.zeros_like(values[:, 0]) if last is None else last.detach().to(values.dtype)
    after = torch.where(_ends(mask), end[:, None], after)
    return torch.where(mask, rewards + gamma * after - values, torch.zeros_like(values))


def advantages(deltas: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE: A_t = sum_i (gamma lambda)^i delta_{t+i} within the completion, Eq. 22 and 24, in log2(T) passes.

    Args:
        deltas: [B, T] TD errors.
        mask: [B, T] bool.
        gamma: discount per token.
        lam: lambda in [0, 1]; 1 gives return minus value, 0 the TD error itself.

    Returns:
        [B, T]; 0 off the completions.

    Raises:
        ValueError: if lambda is not in [0, 1].
    """
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lambda must be between 0 and 1, got {lam!r}.")
    goes_on = mask & ~_ends(mask)
    return reverse_scan(deltas * mask, goes_on.to(deltas.dtype) * (gamma * lam))


def length_advantages(
    values: Tensor, mask: Tensor, gamma: float, lam: float = 1.0, last: Tensor | None = None
) -> Tensor:
    """A^length, Eq. 24: positive where a token made the completion shorter than the LenVM expected.

    Args:
        values: [B, T] V(s_t) of a LenVM (`state_values`).
        mask: [B, T] bool.
        gamma: the checkpoint's discount.
        lam: lambda of GAE.
        last: [B] V(s_L) of cut completions. Without it a completion that max_tokens cut counts as if it had ended
            there, which rewards running into the bound.

    Returns:
        [B, T].
    """
    return advantages(td_errors(length_rewards(mask, gamma), values, mask, gamma, last), mask, gamma, lam)


def combine(task: Tensor, length: Tensor, scale: float) -> Tensor:
    """A^total = A^task + s A^length, Eq. 26: s > 0 penalises longer completions, s < 0 encourages them.

    Args:
        task: [B, T], or [B, 1] where a task gives one advantage a completion (GRPO, RLOO).
        length: [B, T].
        scale: s. Advantages of length lie in (-1, 1): compare with the spread of the task's before choosing it.
    """
    return task + scale * length


def whiten(advantage: Tensor, mask: Tensor, shift: bool = True) -> Tensor:
    """Mean 0 and standard deviation 1 over all tokens of the batch (population variance, eps 1e-8).

    Whiten task and length apart only on purpose: it makes s a ratio of spreads and hides how small one of them was.

    Args:
        advantage: [B, T].
        mask: [B, T] bool, the tokens that count.
        shift: subtract the mean; without it only the spread is normalised.

    Returns:
        [B, T]; 0 off the completions.
    """
    weight = mask.to(advantage.dtype)
    count = weight.sum().clamp(min=1.0)
    mean = (advantage * weight).sum() / count
    variance = ((advantage - mean).square() * weight).sum() / count
    centred = advantage - mean if shift else advantage
    return centred * torch.rsqrt(variance + 1e-8) * weight


def _ends(mask: Tensor) -> Tensor:
    """[B, T] bool, the last token of each completion."""
    return mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
