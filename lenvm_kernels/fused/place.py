"""`place_candidates`: what a guided step does before it looks at the logits, in one launch.

One program is a piece of one row's work: its numbers, and, where the host's attention needs a request table of
candidates, a piece of its prefix, written into the table's row of each candidate; or a piece of one KV buffer of the
candidate it chose last, moved to the slot that the token was given.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lenvm_kernels.buffers import CandidateRows, Keep, RequestTables
from lenvm_kernels.fused.common import rowwise

BLOCK = 1024
"""Slots, or bytes, of a piece."""


@triton.jit(do_not_specialize=["ROWS", "PARTS"])  # they change from step to step
def place_kernel(
    LENGTHS, START, POOL_ROWS, SCRATCH, REQUESTS, VIRTUAL, ADDRESSES, CHOSEN, TARGET,
    POSITIONS, SEQUENCES, OWN, PREFIX, PLACED_ROWS, EMITTED,
    start_row, scratch_row, requests_row, virtual_row, target_row, ROWS, K, PARTS, PIECES,
    BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, TABLES: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Parts 0..PARTS - 1 of a row are of its prefix, the others of its KV, PIECES for each buffer. Rows from ROWS on
    stand for nobody."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    n = tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    candidate = row * K + k
    if row >= ROWS:
        if part == 0:
            nothing = tl.zeros((BLOCK_K,), tl.int64)
            tl.store(POSITIONS + candidate, nothing, mask=k < K)
            tl.store(SEQUENCES + candidate, nothing + 1, mask=k < K)
            tl.store(OWN + candidate, nothing, mask=k < K)
            tl.store(PREFIX + row, row * 0)
            tl.store(PLACED_ROWS + row, row * 0)
            tl.store(EMITTED + row, row * 0)
    elif part < PARTS:
        pool_row = tl.load(POOL_ROWS + row)
        length = tl.load(LENGTHS + row).to(tl.int64)
        if part == 0:
            own = tl.load(SCRATCH + row * scratch_row + k, mask=k < K, other=0)
            tl.store(POSITIONS + candidate, k * 0 + length, mask=k < K)
            tl.store(SEQUENCES + candidate, k * 0 + length + 1, mask=k < K)
            tl.store(OWN + candidate, own, mask=k < K)
            tl.store(PREFIX + row, length)
            tl.store(PLACED_ROWS + row, pool_row)
            tl.store(EMITTED + row, length - tl.load(START + row * start_row))
            if TABLES:
                tl.store(VIRTUAL + candidate * virtual_row + length, own.to(tl.int32), mask=k < K)
        if TABLES:
            place = part * BLOCK + n
            slot = tl.load(REQUESTS + pool_row * requests_row + place, mask=place < length, other=0)
            for i in range(K):
                tl.store(VIRTUAL + (row * K + i) * virtual_row + place, slot, mask=place < length)
    elif KEEP:
        piece = part - PARTS
        buffer = piece // PIECES
        begin = tl.load(ADDRESSES + buffer * 2).to(tl.pointer_type(tl.uint8))
        width = tl.load(ADDRESSES + buffer * 2 + 1)
        source = tl.load(CHOSEN + tl.load(POOL_ROWS + row))
        target = tl.load(TARGET + row * target_row).to(tl.int64)
        byte = (piece % PIECES) * BLOCK + n
        tl.store(begin + target * width + byte, tl.load(begin + source * width + byte, mask=byte < width), byte < width)


def _launch(
    pool_rows: Tensor,
    given: tuple[Tensor, Tensor, Tensor],
    tables: RequestTables | None,
    parts: int,
    keep: Keep | None,
    into: tuple[Tensor, ...],
    places: tuple[int, int],
) -> None:
    """`given`, `tables` and `into` are read and written by parts below `parts`; `places`: rows of `into`, and K."""
    (lengths, start, scratch), (rows, slots) = given, places
    requests, virtual = (pool_rows, pool_rows) if tables is None else tables
    pieces = 1 if keep is None else triton.cdiv(keep.kv.widest, BLOCK)
    buffers = 0 if keep is None else len(keep.kv.buffers)
    addresses, chosen, target = (
        (pool_rows, pool_rows, pool_rows)  # not read
        if keep is None
        else (keep.kv.addresses, keep.chosen, keep.target)
    )
    place_kernel[(rows, parts + buffers * pieces)](
        lengths, start, pool_rows, scratch, requests, virtual, addresses, chosen, target, *into,
        start.stride(0), scratch.stride(0), requests.stride(0), virtual.stride(0), target.stride(0),
        len(pool_rows), slots, parts, pieces,
        BLOCK_K=max(16, triton.next_power_of_2(slots)), BLOCK=BLOCK, TABLES=tables is not None, KEEP=keep is not None,
        num_warps=4,
    )  # fmt: skip


def place_candidates(
    lengths: Tensor,
    start: Tensor,
    pool_rows: Tensor,
    scratch: Tensor,
    tables: RequestTables | None,
    longest: int,
    keep: Keep | None,
    into: CandidateRows | None,
) -> CandidateRows:
    """Launch; arguments as in `lenvm_kernels.dispatch.place_candidates`."""
    scratch = rowwise(scratch)
    rows, slots = scratch.shape
    found = CandidateRows.empty(rows, slots, lengths.device) if into is None else into
    parts = 1 if tables is None else triton.cdiv(longest, BLOCK)
    _launch(pool_rows, (lengths, start, scratch), tables, parts, keep, found, (len(found.prefix), slots))
    return found


def keep_chosen(keep: Keep, pool_rows: Tensor) -> None:
    """Launch; arguments as in `lenvm_kernels.dispatch.keep_chosen`."""
    _launch(pool_rows, (pool_rows,) * 3, None, 0, keep, (pool_rows,) * 6, (len(pool_rows), 1))
