"""What the value head's logit z stands for: the discounted return, or what the paper compares it with.

The paper's section 4.1 (Figure 5a) compares four pairs of an activation f and a transform g of the remaining length n;
the loss is the squared error (f(z) - g(n))^2, and the predicted length g^-1(f(z)):

    representation       f(z)         g(n)               predicted length
    return (default)     sigmoid(z)   1 - gamma^n        softplus(z) / |ln gamma|
    length               softplus(z)  n                  softplus(z)
    normalized_length    sigmoid(z)   min(n, N) / N      N sigmoid(z)
    log_length           softplus(z)  ln(1 + n)          exp(z)

With `return`, f = -V and g = -G. Only that one is served: tilting, the paper's hard rule and the fitted spread are
defined on it. The others exist to be measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lenvm.definitions import decay_nats, length_from_logit

Representation = Literal["return", "length", "normalized_length", "log_length"]
REPRESENTATIONS: tuple[str, ...] = get_args(Representation)


@dataclass(frozen=True)
class ValueSpace:
    """Activation and transform of one representation; functions keep shape and device and never synchronise.

    Attributes:
        gamma: discount per token (`return` only).
        representation: one of REPRESENTATIONS.
        longest: N of `normalized_length` in tokens; longer lengths count as this one.

    Raises:
        ValueError: for an unknown representation, a gamma outside (0, 1), or `normalized_length` without N.
    """

    gamma: float
    representation: Representation = "return"
    longest: int | None = None

    def __post_init__(self) -> None:
        decay_nats(self.gamma)
        if self.representation not in REPRESENTATIONS:
            raise ValueError(
                f"the target representation must be one of {', '.join(REPRESENTATIONS)}, got {self.representation!r}."
            )
        if (self.representation == "normalized_length") != (self.longest is not None):
            raise ValueError(
                "`normalized_length` needs the length that counts as 1, and no other representation takes one, "
                f"got {self.longest!r} with {self.representation!r}."
            )

    def shortfall(self, z: Tensor, remaining: Tensor) -> Tensor:
        """g(n) - f(z): positive where the head predicts too short. With `return` it is V - G, without cancellation.

        Args:
            z: [...] value logits, float32 or float64.
            remaining: [...] tokens to come, n >= 1.

        Returns:
            [...] in the dtype of z.
        """
        n = remaining.to(z.dtype)
        if self.representation == "return":  # V - G = sigmoid(-z) - gamma^n keeps its digits at both ends
            return torch.sigmoid(-z) - torch.exp(n * -decay_nats(self.gamma))
        if self.longest is not None:
            return n.clamp(max=self.longest) / self.longest - torch.sigmoid(z)
        return (n if self.representation == "length" else torch.log1p(n)) - F.softplus(z)

    def length(self, z: Tensor) -> Tensor:
        """Predicted remaining length in tokens, g^-1(f(z)), [...] in the dtype of z."""
        if self.representation == "return":
            return length_from_logit(z, self.gamma)
        if self.longest is not None:
            return self.longest * torch.sigmoid(z)
        return F.softplus(z) if self.representation == "length" else torch.exp(z)  # e^softplus(z) - 1 = e^z
