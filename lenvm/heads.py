"""The heads on a backbone's final hidden state: value (Eq. 7) and length distribution.

Parameters are bare `nn.Parameter`s, never `nn.Linear` submodules: `lora_target: all`, quantizers and fused kernels
pick modules by the class name Linear, and would otherwise adapt or quantise a head. The maths runs in float32
whatever the backbone's dtype, because a bfloat16 z costs up to 1.6 % of the length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLPHead(nn.Module):
    """Two layers with SiLU: w2 . SiLU(w1 h + b1) + b2 (Eq. 7).

    Parameters: w1 [H, H], b1 [H], w2 [out, H], b2 [out].
    """

    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.out_features = out_features
        self.w1 = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.b1 = nn.Parameter(torch.zeros(hidden_size))
        self.w2 = nn.Parameter(torch.empty(out_features, hidden_size))
        self.b2 = nn.Parameter(torch.zeros(out_features))

    def reset_parameters(self, std: float) -> None:
        """Normal weights with the backbone's initialiser range, zero biases."""
        for weight in (self.w1, self.w2):
            nn.init.normal_(weight, std=std)
        for bias in (self.b1, self.b2):
            nn.init.zeros_(bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] of any float dtype -> [..., out] float32."""
        if not torch.is_autocast_enabled(hidden.device.type):
            return self._heads(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return self._heads(hidden)

    def _heads(self, hidden: Tensor) -> Tensor:
        inner = F.silu(F.linear(hidden.float(), self.w1.float(), self.b1.float()))
        return F.linear(inner, self.w2.float(), self.b2.float())


class ValueHead(MLPHead):
    """Scalar head: hidden [..., H] -> z [...] float32; V = -sigmoid(z) (Eq. 8)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).squeeze(-1)


class LengthHead(MLPHead):
    """Head of the length distribution: hidden [..., H] -> logits over bins [..., B] float32."""
