"""The training objective: Eq. 9 on the value, cross-entropy on the length distribution.

Functions return **sums** over the target positions they are given. The caller divides by the weight of the whole
optimizer step (all ranks, all accumulation steps): the number of its target tokens, so that no mean of means can creep
in.

A completion that was cut before its stop token is *censored*: its remaining length is only known to be at least
`remaining`, and it is never trained as if it had ended there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lenvm.bins import LengthBins
from lenvm.returns import lambda_returns, same_completion
from lenvm.targets import ValueSpace

Weighting = Literal["token", "trajectory"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


def penalty(error: Tensor, huber: float | None) -> Tensor:
    """Squared error, or Huber's: e^2 up to |e| = huber, 2 huber |e| - huber^2 beyond (value and slope are continuous,
    and huber -> infinity is the squared error itself, not half of it). Any shape."""
    if huber is None:
        return error.square()
    size = error.abs()
    return torch.where(size <= huber, error.square(), 2.0 * huber * size - huber * huber)


def value_losses(
    z: Tensor,
    remaining: Tensor,
    censored: Tensor,
    space: ValueSpace,
    huber: float | None = None,
) -> Tensor:
    """Squared error of each state, (V - G)^2 with the default representation (the terms of Eq. 9).

    A censored position is one-sided: its G is at most -(1 - gamma^n), so only a V above that costs.

    Args:
        z: [M] float32 logits at the target positions.
        remaining: [M] tokens to come; for a censored position the least that is possible.
        censored: [M] bool.
        space: what z stands for.
        huber: threshold of Huber's loss, in the unit of the target; None for the squared error.

    Returns:
        [M] float32.
    """
    error = space.shortfall(z.float(), remaining)
    return penalty(torch.where(censored, error.clamp(min=0.0), error), huber)


def length_nlls(length_logits: Tensor, remaining: Tensor, censored: Tensor, bins: LengthBins) -> Tensor:
    """-log q(n | s) of each state, two-hot, and -log P(n >= remaining) at censored positions.

    Args:
        length_logits: [M, B] float32.
        remaining: [M] tokens to come; for a censored position the least that is possible.
        censored: [M] bool.
        bins: the bins.

    Returns:
        [M] float32.
    """
    log_q = torch.log_softmax(length_logits.float(), dim=-1)
    low, high, weight = bins.two_hot(remaining)
    finished = torch.lerp(log_q.gather(-1, low[:, None])[:, 0], log_q.gather(-1, high[:, None])[:, 0], weight)
    survival = bins.log_survival(log_q, remaining)
    return -torch.where(censored, survival, finished)


@dataclass(frozen=True)
class Objective:
    """Everything that decides the loss of a batch; the defaults are Eq. 9.

    Attributes:
        space: what z stands for.
        bins: bins of the length distribution; None without a length head.
        lam: lambda of the value's targets; 1 is the closed form.
        bootstrap: censored completions start from the model's own value (`lambda_returns`) instead of one-sided.
        weighting: `token`: each target token weighs 1 (Eq. 39). `trajectory`: 1 / (target tokens of its completion)
            (Eq. 43), which Appendix E shows to shift the target of a state towards short completions.
        huber: threshold of Huber's loss on the value; None for the squared error.

    Raises:
        ValueError: if lam is outside [0, 1], huber is not positive, or bootstrapping is asked of a representation other
            than the return (only the return obeys the recursion).
    """

    space: ValueSpace
    bins: LengthBins | None = None
    lam: float = 1.0
    bootstrap: bool = False
    weighting: Weighting = "token"
    huber: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.lam <= 1.0:
            raise ValueError(f"lambda must be between 0 and 1, got {self.lam!r}.")
        if self.huber is not None and not self.huber > 0.0:
            raise ValueError(f"the threshold of Huber's loss must be positive, got {self.huber!r}.")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"the weighting must be one of {', '.join(WEIGHTINGS)}, got {self.weighting!r}.")
        if self.bootstraps and self.space.representation != "return":
            raise ValueError(
                f"bootstrapped targets need the discounted return, got {self.space.representation!r}: no other "
                "representation obeys G_t = r + gamma G_{t+1} (Eq. 3)."
            )

    @property
    def bootstraps(self) -> bool:
        """Whether the targets depend on the model's own values."""
        return self.lam < 1.0 or self.bootstrap

    def weights(self, mask: Tensor, completion: Tensor | None = None) -> Tensor:
        """Weight of each target state.

        Args:
            mask: [B, T] bool, the target states.
            completion: [B, T] int64 number of the completion in its row; None where a row is one completion.

        Returns:
            [M] float32, the rows' target states one after the other.
        """
        if self.weighting == "token":
            return torch.ones(int(mask.sum()), device=mask.device)
        number = torch.zeros_like(mask, dtype=torch.int64) if completion is None else completion
        states = torch.zeros(len(mask), int(number.max()) + 1, device=mask.device).scatter_add_(1, number, mask.float())
        return 1.0 / states.gather(1, number)[mask]

    def counted(self, mask: Tensor, completion: Tensor | None = None) -> Tensor:
        """What the denominator counts: every target state, or the first one of each completion.

        Args:
            mask: [B, T] bool.
            completion: as for `weights`.

        Returns:
            [B, T] bool; the sum of `weights` is the number of True.
        """
        if self.weighting == "token":
            return mask
        first = mask.clone()
        first[:, 1:] &= ~same_completion(mask, completion)
        return first

    def sums(
        self,
        z: Tensor,
        length_logits: Tensor | None,
        remaining: Tensor,
        mask: Tensor,
        censored: Tensor,
        completion: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weighted sums of the value's and the length distribution's loss over a batch.

        Args:
            z: [B, T] float32.
            length_logits: [B, T, bins] float32, or None where that loss is not wanted.
            remaining: [B, T] int64 tokens to come; any value off target.
            mask: [B, T] bool, the target states; those of one completion are neighbours.
            censored: [B, T] bool.
            completion: [B, T] int64 number of the completion in its row; None where a row is one completion.

        Returns:
            (value, length), scalars float32; length is 0 without logits.
        """
        n, cut, weight = remaining[mask], censored[mask], self.weights(mask, completion)
        if self.bootstraps:
            z32 = z.float()
            target = lambda_returns(
                z32, remaining, mask, censored, self.space.gamma, self.lam, self.bootstrap, completion
            )
            value = penalty(torch.sigmoid(-z32[mask]) - target[mask], self.huber)
        else:
            value = value_losses(z[mask], n, cut, self.space, self.huber)
        total = (weight * value).sum()
        if length_logits is None or self.bins is None:
            return total, total.new_zeros(())
        return total, (weight * length_nlls(length_logits[mask], n, cut, self.bins)).sum()
