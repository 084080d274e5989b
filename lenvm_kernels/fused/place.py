"""`place_candidates`: what a guided step does before it looks at the logits, in one launch.

One program is a piece of one row's work: a piece of its prefix, written into the request table of each of its
candidates, or a piece of one KV buffer of the candidate it chose last, moved to the slot that the token was given.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lenvm_kernels.buffers import CandidateRows, Keep, RequestTables
from lenvm_kernels.fused.common import rowwise

BLOCK = 1024
"""Slots, or bytes, of a piece."""


@triton.jit
def place_kernel(
    LENGTHS, START, POOL_ROWS, SCRATCH, REQUESTS, VIRTUAL, POSITIONS, SEQUENCES, EMITTED, ADDRESSES, CHOSEN, TARGET,
    start_row, scratch_row, requests_row, virtual_row, target_row, K, PARTS, PIECES,
    BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Parts 0..PARTS - 1 of a row are of its prefix, the others of its KV, PIECES for each buffer."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    pool_row = tl.load(POOL_ROWS + row)
    n = tl.arange(0, BLOCK)
    if part < PARTS:
        length = tl.load(LENGTHS + row).to(tl.int64)
        if part == 0:
            k = tl.arange(0, BLOCK_K)
            candidate = row * K + k
            tl.store(POSITIONS + candidate, k * 0 + length, mask=k < K)
            tl.store(SEQUENCES + candidate, k * 0 + length + 1, mask=k < K)
            tl.store(EMITTED + row, length - tl.load(START + row * start_row))
            own = tl.load(SCRATCH + row * scratch_row + k, mask=k < K, other=0)
            tl.store(VIRTUAL + candidate * virtual_row + length, own.to(tl.int32), mask=k < K)
        place = part * BLOCK + n
        slot = tl.load(REQUESTS + pool_row * requests_row + place, mask=place < length, other=0)
        for k in range(K):
            tl.store(VIRTUAL + (row * K + k) * virtual_row + place, slot, mask=place < length)
    elif KEEP:
        piece = part - PARTS
        buffer = piece // PIECES
        begin = tl.load(ADDRESSES + buffer * 2).to(tl.pointer_type(tl.uint8))
        width = tl.load(ADDRESSES + buffer * 2 + 1)
        source = tl.load(CHOSEN + pool_row)
        target = tl.load(TARGET + row * target_row).to(tl.int64)
        byte = (piece % PIECES) * BLOCK + n
        tl.store(begin + target * width + byte, tl.load(begin + source * width + byte, mask=byte < width), byte < width)


def _launch(
    rows: int, pool_rows: Tensor, slots: int, placing: tuple[Tensor, ...], parts: int, keep: Keep | None
) -> None:
    """`placing`: the arguments that parts below `parts` read."""
    lengths, start, scratch, requests, virtual, positions, sequences, emitted = placing
    pieces = 1 if keep is None else triton.cdiv(keep.kv.widest, BLOCK)
    buffers = 0 if keep is None else len(keep.kv.buffers)
    addresses, chosen, target = (
        (pool_rows, pool_rows, pool_rows)  # not read
        if keep is None
        else (keep.kv.addresses, keep.chosen, keep.target)
    )
    place_kernel[(rows, parts + buffers * pieces)](
        lengths, start, pool_rows, scratch, requests, virtual, positions, sequences, emitted, addresses, chosen, target,
        start.stride(0), scratch.stride(0), requests.stride(0), virtual.stride(0), target.stride(0),
        slots, parts, pieces,
        BLOCK_K=max(16, triton.next_power_of_2(slots)), BLOCK=BLOCK, KEEP=keep is not None, num_warps=4,
    )  # fmt: skip


def place_candidates(
    lengths: Tensor,
    start: Tensor,
    pool_rows: Tensor,
    scratch: Tensor,
    tables: RequestTables,
    longest: int,
    keep: Keep | None,
) -> CandidateRows:
    """Launch; arguments as in `lenvm_kernels.dispatch.place_candidates`."""
    scratch, (requests, virtual) = rowwise(scratch), tables
    rows, slots = scratch.shape
    made = torch.empty(2 * rows * slots + rows, dtype=torch.int64, device=lengths.device)
    positions, sequences, emitted = made.split([rows * slots, rows * slots, rows])
    placing = (lengths, start, scratch, requests, virtual, positions, sequences, emitted)
    _launch(rows, pool_rows, slots, placing, triton.cdiv(longest, BLOCK), keep)
    return CandidateRows(positions, sequences, emitted)


def keep_chosen(keep: Keep, pool_rows: Tensor) -> None:
    """Launch; arguments as in `lenvm_kernels.dispatch.keep_chosen`."""
    _launch(len(pool_rows), pool_rows, 1, (pool_rows,) * 8, 0, keep)
