"""Bins of remaining length: the support of the length distribution q(n | s).

Centres are 1..12 tokens, then grow by a ratio of 1.09 up to the longest trained length (about 104 bins to 32k). A
length between two centres is **two-hot**: its weight is split linearly between both, so that the expected centre is
the length itself. Decoding a bin back to token counts uses the same weights, normalised per bin (`decode_matrix`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

EXACT = 12
"""Lengths up to here have a bin of their own: near the stop token a single token matters."""
RATIO = 1.09


@dataclass(frozen=True)
class LengthBins:
    """Bin centres in tokens, strictly increasing, starting at 1.

    Raises:
        ValueError: if the centres are not whole numbers, do not start at 1 or do not increase.
    """

    centres: tuple[int, ...]

    def __post_init__(self) -> None:
        c = self.centres
        if len(c) < 2 or c[0] != 1 or any(b <= a for a, b in itertools.pairwise(c)) or any(int(x) != x for x in c):
            raise ValueError(
                "bin centres must be at least two whole numbers of tokens, start at 1 and increase strictly, "
                f"got {list(c)[:8]}{'...' if len(c) > 8 else ''}."
            )

    @classmethod
    def for_max_length(cls, longest: int, ratio: float = RATIO) -> LengthBins:
        """Bins that reach `longest` tokens.

        Raises:
            ValueError: if longest < 2.
        """
        if longest < 2:
            raise ValueError(f"the longest length must be at least 2 tokens, got {longest}.")
        centres = list(range(1, min(EXACT, longest) + 1))
        x = float(centres[-1])
        while centres[-1] < longest:
            x = max(x * ratio, centres[-1] + 1)
            centres.append(min(round(x), longest))
        return cls(tuple(centres))

    @staticmethod
    def cached(centres: Sequence[int]) -> LengthBins:
        """The bins of these centres; equal centres share one object and its tables."""
        return _cached_bins(tuple(centres))

    def __len__(self) -> int:
        return len(self.centres)

    @property
    def longest(self) -> int:
        """The last centre; longer lengths count as this one."""
        return self.centres[-1]

    def table(self, name: TableName, device: torch.device) -> Tensor:
        """A table of these bins on a device, copied there once: none of the functions below waits for the device."""
        return _table(self.centres, name, device)

    @cached_property
    def centre_tensor(self) -> Tensor:
        """[B] float64 centres in tokens, on the CPU."""
        return torch.tensor(self.centres, dtype=torch.float64)

    def two_hot(self, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two-hot code of lengths: n = (1 - w) centre[low] + w centre[high].

        Args:
            n: lengths in tokens, any shape, any real dtype; clamped to [1, longest].

        Returns:
            low [...] int64, high [...] int64 (= low where n is a centre), w [...] float32 weight of `high`.
        """
        centres = self.table("centre_tensor", n.device)
        x = n.to(torch.float64).clamp(1, self.longest)
        high = torch.searchsorted(centres, x).clamp(max=len(self) - 1)
        exact = centres[high] == x
        low = torch.where(exact, high, high - 1)
        span = torch.where(exact, torch.ones_like(x), centres[high] - centres[low])
        weight = torch.where(exact, torch.zeros_like(x), (x - centres[low]) / span)
        return low, high, weight.float()

    def targets(self, n: Tensor) -> Tensor:
        """[..., B] float32 dense two-hot code of n."""
        low, high, weight = self.two_hot(n)
        out = torch.zeros(*n.shape, len(self), dtype=torch.float32, device=n.device)
        out.scatter_(-1, low[..., None], (1 - weight)[..., None])
        return out.scatter_add_(-1, high[..., None], weight[..., None])

    def decode_matrix(self, longest: int | None = None) -> Tensor:
        """DEC[b, n]: probability of exactly n tokens inside bin b, the two-hot weights normalised per bin.

        Args:
            longest: last column N; default the last centre. Bins beyond a smaller N lose their mass past it.

        Returns:
            [B, N + 1] float32 on the CPU; column 0 is 0 (q speaks of states before the stop token, so n >= 1); with
            the default N each row sums to 1.
        """
        full = _decode_matrix(self.centres)
        if longest is None or longest == self.longest:
            return full
        if longest < self.longest:
            return full[:, : longest + 1].contiguous()
        return torch.nn.functional.pad(full, (0, longest - self.longest))

    def pmf(self, log_q: Tensor) -> Tensor:
        """P(n = k), k = 0..longest, of the length distribution.

        Args:
            log_q: [..., B] log-probabilities of the bins.

        Returns:
            [..., longest + 1] float32.
        """
        return log_q.float().exp() @ self.table("decode", log_q.device)

    def expected(self, log_q: Tensor) -> Tensor:
        """E[n] in tokens, [...]: sum_b q_b centre_b (a bin's decoded mean is its centre up to rounding of the grid)."""
        return (log_q.float().exp() * self.table("means", log_q.device)).sum(-1)

    @cached_property
    def decode(self) -> Tensor:
        """`decode_matrix()`."""
        return self.decode_matrix()

    @cached_property
    def means(self) -> Tensor:
        """[B] float32 mean of each bin in tokens, on the CPU."""
        dec = self.decode_matrix().double()
        return (dec @ torch.arange(dec.shape[1], dtype=torch.float64)).float()

    def cdf(self, log_q: Tensor) -> Tensor:
        """P(n <= k), k = 0..longest, [..., longest + 1]."""
        return self.pmf(log_q).cumsum(-1)

    def quantile(self, log_q: Tensor, p: float) -> Tensor:
        """Smallest k with P(n <= k) >= p, [...] int64 tokens."""
        # 1e-6: the float32 sum may stop just short of 1
        return (self.cdf(log_q) < p - 1e-6).sum(-1).clamp(max=self.longest)

    def log_survival(self, log_q: Tensor, n: Tensor) -> Tensor:
        """log P(remaining length >= n), the likelihood of a completion that was cut after n more tokens.

        Args:
            log_q: [..., B].
            n: [...] tokens; n <= 1 gives 0 (certain), n > longest counts as longest.

        Returns:
            [...] float32, <= 0.
        """
        # P(n' >= n) = sum_b q_b S_b(n), S_b(n) = sum_{k >= n} DEC[b, k]
        survival = self.table("survival", log_q.device)
        rows = survival[n.long().clamp(1, self.longest)]
        return torch.logsumexp(log_q.float() + rows.log(), dim=-1).clamp(max=0.0)

    @cached_property
    def survival(self) -> Tensor:
        """[longest + 1, B] float32: P(n >= k) inside each bin, on the CPU."""
        dec = self.decode_matrix().double()
        tail = dec.flip(1).cumsum(1).flip(1).clamp(0.0, 1.0)
        return tail.T.contiguous().float()


TableName = Literal["centre_tensor", "decode", "means", "survival"]


# not in inference mode, whoever asks first: a training's backward pass may read the tables too
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _table(centres: tuple[int, ...], name: TableName, device: torch.device) -> Tensor:
    table: Tensor = getattr(_cached_bins(centres), name)
    return table.to(device)


@lru_cache(maxsize=8)
def _cached_bins(centres: tuple[int, ...]) -> LengthBins:
    return LengthBins(centres)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _decode_matrix(centres: tuple[int, ...]) -> Tensor:
    bins = LengthBins(centres)
    weights = bins.targets(torch.arange(1, bins.longest + 1)).double()  # [N, B]
    dec = (weights / weights.sum(0, keepdim=True)).T
    return torch.nn.functional.pad(dec, (1, 0)).float().contiguous()
