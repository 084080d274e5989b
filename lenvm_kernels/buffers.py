"""What a guidance step writes into, beside its results: KV buffers and the tensors of the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

_STEP = 256
"""Tokens by which masks grow."""


@dataclass(frozen=True)
class SlotBuffers:
    """The KV buffers of one pool, all addressed by the same slots.

    Attributes:
        buffers: N tensors [slots, ...], contiguous; of whatever dtypes.
    """

    buffers: Sequence[Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        assert all(b.is_contiguous() for b in self.buffers), "KV buffers are contiguous"

    @cached_property
    def addresses(self) -> Tensor:
        """[N, 2] int64 on the device: where each begins, and bytes of a slot."""
        rows = [(b.data_ptr(), b.stride(0) * b.element_size()) for b in self.buffers]
        return torch.tensor(rows, dtype=torch.int64, device=self.buffers[0].device)

    @cached_property
    def slots(self) -> int:
        """Slots of the smallest."""
        return min(len(b) for b in self.buffers)

    @cached_property
    def widest(self) -> int:
        """Most bytes of a slot."""
        return max(b.stride(0) * b.element_size() for b in self.buffers)


class Keep(NamedTuple):
    """Chosen candidates whose KV moves to the slot that their token was given.

    Attributes:
        kv: the pool.
        chosen: [P] int64 slot of the candidate chosen last, by row of the host's request pool.
        target: [R] int64 slots of the tokens.
    """

    kv: SlotBuffers
    chosen: Tensor
    target: Tensor


class RequestTables(NamedTuple):
    """Which slots a request's tokens are in, as attention reads it.

    Attributes:
        requests: [P, C] int32, the host's, a row for each request of its pool.
        virtual: [N, C] int32, ours, a row for each candidate: its row's prefix, then its own slot.
    """

    requests: Tensor
    virtual: Tensor


class PrefixMasks:
    """What K candidates of each row see, kept from step to step: a prefix grows by one token at a time.

    Args:
        dtype: of the queries.
        device: of the mask.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.dtype, self.device = dtype, device
        self.mask = torch.empty(0, 0, 0, dtype=dtype, device=device)
        """[R, W, W + C]: 0 where one of W candidates sees one of the W or a token of its prefix, -inf elsewhere."""
        self.seen = torch.empty(0, dtype=torch.int64)
        """[R] tokens of the prefix that each row of `mask` shows, on the host."""

    def fit(self, rows: int, width: int, longest: int) -> None:
        """Make it large enough for `width` candidates in each of `rows` rows behind at most `longest` tokens."""
        have_rows, have_width, have_length = self.mask.shape
        if rows <= have_rows and width <= have_width and longest <= have_length - have_width:
            return
        length = -(-longest // _STEP) * _STEP
        larger = max(rows, have_rows), max(width, have_width), max(length, have_length - have_width)
        if prod(larger) <= 2 * rows * width * length:  # or many rows after a long one would take the size of both
            rows, width, length = larger
        self.mask = torch.full((rows, width, width + length), -torch.inf, dtype=self.dtype, device=self.device)
        self.mask.diagonal(dim1=1, dim2=2).zero_()
        self.seen = torch.zeros(rows, dtype=torch.int64)

    def view(self, rows: int, width: int, longest: int) -> Tensor:
        """[rows, 1, width, width + longest] of it: every candidate sees itself and its prefix."""
        row, line, _ = self.mask.stride()
        begin = self.mask.shape[1] - width
        # at once, because this is done at every step: mask[:rows, None, begin:, begin : begin + width + longest]
        return self.mask.as_strided((rows, 1, width, width + longest), (row, line, line, 1), begin * (line + 1))


class PrefixRows(NamedTuple):
    """R x K candidates that share their rows' prefixes, for an attention that reads each prefix once.

    Attributes:
        slots: [R * (K + L)] int64 KV slots: of each row's candidates, then of its prefix, padded with slot 0.
        mask: [R, 1, K, K + L] float, what each candidate sees: itself and its prefix (0), and nothing else (-inf).
        positions: [R * K] int64 places in their sequences.
        lengths: [R * K] int64, positions + 1.
    """

    slots: Tensor
    mask: Tensor
    positions: Tensor
    lengths: Tensor


class SharedRows(NamedTuple):
    """R x K candidates that share their rows' prefixes, as a kernel finds them.

    Attributes:
        pool_rows: [R] int64 rows of `requests`.
        lengths: [R] int32 or int64 tokens of each prefix.
        own: [R, K] int64 KV slots of the candidates.
        requests: [P, C] int32, the host's: slots of each request's tokens.
    """

    pool_rows: Tensor
    lengths: Tensor
    own: Tensor
    requests: Tensor


class CandidateRows(NamedTuple):
    """R x K candidates as decode rows of one forward, row after row.

    Attributes:
        positions: [R * K] int64 places in their sequences.
        lengths: [R * K] int64, positions + 1.
        own: [R * K] int64 KV slots.
        prefix: [R] int64 tokens before a row's candidates.
        pool_rows: [R] int64 rows of the host's request pool.
        emitted: [R] int64 tokens that the rows' targets have counted so far.
    """

    positions: Tensor
    lengths: Tensor
    own: Tensor
    prefix: Tensor
    pool_rows: Tensor
    emitted: Tensor

    @classmethod
    def empty(cls, rows: int, slots: int, device: torch.device) -> CandidateRows:
        """Room for `slots` candidates in each of `rows` rows."""
        sizes = [rows * slots] * 3 + [rows] * 3
        return cls(*torch.empty(sum(sizes), dtype=torch.int64, device=device).split(sizes))

    def shared(self, requests: Tensor) -> SharedRows:
        """The same for an attention that reads each prefix once, in the host's table `requests` [P, C]."""
        return SharedRows(self.pool_rows, self.prefix, self.own.view(len(self.prefix), -1), requests)


class DrawBuffers(NamedTuple):
    """Where the outcome of a draw goes.

    Attributes:
        logits: [B, V] of a batch; a row drawn becomes one-hot: 0 at its token, -inf elsewhere. None: not wanted.
        rows: [R] int64 the batch rows drawn; None: all, in order.
        chosen: [P] int64, by row of the host's request pool, the KV slot of the candidate drawn; None: not wanted.
        pool_rows: [R] int64 rows of `chosen`.
        scratch: [R, >= K] int64 KV slots of the candidates.
        results: [WORDS, R] int64 memory of the `TiltSample`; None: new memory.
    """

    logits: Tensor | None
    rows: Tensor | None
    chosen: Tensor | None
    pool_rows: Tensor
    scratch: Tensor
    results: Tensor | None = None
