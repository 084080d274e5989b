"""The heads on a backbone's final hidden state: value (Eq. 7), length distribution, and lookahead.

Parameters are bare `nn.Parameter`s, never `nn.Linear` submodules: `lora_target: all`, quantizers and fused kernels
pick modules by the class name Linear, and would otherwise adapt or quantise a head. The maths runs in float32
whatever the backbone's dtype, because a bfloat16 z costs up to 1.6 % of the length.
"""

from __future__ import annotations

import math

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


class LookaheadHead(nn.Module):
    """The length distribution after *every* possible next token, from the state before it.

    logits[b] = W2 SiLU(W1 h_t + b1 + E[x]) + b2 stands for q(. | s_t + x). It is distilled (`lenvm.distillation`), not
    trained on observed tokens. E is an own table, or a projection of the embedding that the backbone has anyway, the
    `source` [V, d] of the methods below; a head with a table takes None there.

    Parameters: w1 [r, H], b1 [r], w2 [B, r], b2 [B], and embedding [V, r] or projection [d, r].

    Args:
        hidden_size: H of the states it reads.
        rank: r.
        bins: B.
        tokens: V, makes a table; None makes a projection.
        source_size: d of the embedding that is projected; default H.
    """

    embedding: nn.Parameter | None
    projection: nn.Parameter | None

    def __init__(
        self, hidden_size: int, rank: int, bins: int, tokens: int | None = None, source_size: int | None = None
    ) -> None:
        super().__init__()
        self.hidden_size, self.rank, self.bins = hidden_size, rank, bins
        self.w1 = nn.Parameter(torch.empty(rank, hidden_size))
        self.b1 = nn.Parameter(torch.zeros(rank))
        self.w2 = nn.Parameter(torch.empty(bins, rank))
        self.b2 = nn.Parameter(torch.zeros(bins))
        own = None if tokens is None else nn.Parameter(torch.empty(tokens, rank))
        projected = nn.Parameter(torch.empty(source_size or hidden_size, rank)) if own is None else None
        self.register_parameter("embedding", own)
        self.register_parameter("projection", projected)

    def reset_parameters(self) -> None:
        """Normal weights of the variance 1 / fan-in, zero biases; rows of a table with a standard deviation of 0.5."""
        for weight in (self.w1, self.w2):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for bias in (self.b1, self.b2):
            nn.init.zeros_(bias)
        if self.embedding is not None:
            nn.init.normal_(self.embedding, std=0.5)
        if self.projection is not None:
            nn.init.normal_(self.projection, std=self.projection.shape[0] ** -0.5)

    @torch.no_grad()
    def start_from(self, source: Tensor) -> None:
        """Begin with token vectors that are a random projection of an embedding [V, d], of standard deviation 0.5, so
        that tokens alike to the backbone are alike to the head."""
        source = source.float()
        if self.projection is not None:
            self.projection.mul_(0.5 / (source @ self.projection.float()).std())
        if self.embedding is not None:
            directions = torch.randn(source.shape[1], self.rank, device=source.device) / math.sqrt(source.shape[1])
            vectors = source @ directions
            self.embedding.copy_(vectors * (0.5 / vectors.std()))

    def token_vectors(self, tokens: Tensor, source: Tensor | None = None) -> Tensor:
        """E[x] of tokens [...] int64, [..., r] float32.

        Raises:
            ValueError: the head projects an embedding and none was given.
        """
        if self.embedding is not None:
            return F.embedding(tokens, self.embedding).float()
        if source is None:
            raise ValueError("this lookahead head projects the backbone's embedding: give it as `source`, [V, d].")
        assert self.projection is not None
        return F.embedding(tokens, source).float() @ self.projection.float()

    def forward(self, hidden: Tensor, tokens: Tensor, source: Tensor | None = None) -> Tensor:
        """hidden [..., H] of any float dtype and tokens [..., K] int64 -> logits [..., K, B] float32."""
        if not torch.is_autocast_enabled(hidden.device.type):
            return self._logits(hidden, tokens, source)
        with torch.autocast(hidden.device.type, enabled=False):
            return self._logits(hidden, tokens, source)

    def _logits(self, hidden: Tensor, tokens: Tensor, source: Tensor | None) -> Tensor:
        state = F.linear(hidden.float(), self.w1.float(), self.b1.float())
        inner = F.silu(state.unsqueeze(-2) + self.token_vectors(tokens, source))
        return F.linear(inner, self.w2.float(), self.b2.float())

    def with_table(self, source: Tensor | None) -> LookaheadHead:
        """The same function with a table of its own, which needs no `source` and one gather a token; for inference."""
        if self.embedding is not None:
            return self
        if source is None:
            raise ValueError("this lookahead head projects the backbone's embedding: give it as `source`, [V, d].")
        everything = torch.arange(source.shape[0], device=source.device)
        head = LookaheadHead(self.hidden_size, self.rank, self.bins, tokens=source.shape[0])
        state = {"embedding": self.token_vectors(everything, source)}
        state |= {name: value for name, value in self.state_dict().items() if name != "projection"}
        head.load_state_dict(state)
        return head.to(source.device)
