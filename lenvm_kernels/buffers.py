"""What a guidance step writes into, beside its results: KV buffers and the tensors of the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


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


class CandidateRows(NamedTuple):
    """R x K candidates as decode rows of one forward, row after row.

    Attributes:
        positions: [R * K] int64 places in their sequences.
        lengths: [R * K] int64, positions + 1.
        emitted: [R] int64 tokens that the rows' targets have counted so far.
    """

    positions: Tensor
    lengths: Tensor
    emitted: Tensor


class DrawBuffers(NamedTuple):
    """Where the outcome of a draw goes.

    Attributes:
        logits: [B, V] of a batch; a row drawn becomes one-hot: 0 at its token, -inf elsewhere.
        rows: [R] int64 the batch rows drawn; None: all, in order.
        chosen: [P] int64, by row of the host's request pool, the KV slot of the candidate drawn; None: not wanted.
        pool_rows: [R] int64 rows of `chosen`.
        scratch: [R, >= K] int64 KV slots of the candidates.
    """

    logits: Tensor
    rows: Tensor | None
    chosen: Tensor | None
    pool_rows: Tensor
    scratch: Tensor
