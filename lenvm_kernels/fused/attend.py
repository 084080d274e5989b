"""`attend_prefix`: attention of K candidates that share a row's prefix, whose keys and values are read once for all K.

As K decode rows the prefix would be read K times, and beyond a few hundred tokens a row that reading, not the weights,
is what a step costs. One program of `prefix_kernel` takes a piece of one row's prefix, one KV head, and all candidates
times all query heads that share it: enough rows for tensor cores. The candidates' own tokens, each seen by itself
alone, stand behind the prefix. `merge_kernel` puts the pieces together.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lenvm_kernels.buffers import SharedRows
from lenvm_kernels.fused.common import NEG_INF

MOST_PIECES = 64
PROGRAMS_PER_UNIT = 2
"""Programs for each multiprocessor that pieces are cut for."""
HEADS_AT_ONCE = 4
"""Of one program of `merge_kernel`."""
STAGES = 2
LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["COUNT"])  # it changes from step to step
def prefix_kernel(
    QUERY, KEYS, VALUES, POOL_ROWS, LENGTHS, OWN, REQUESTS, OUT, PARTIAL, WEIGHT,
    query_row, query_head, key_slot, key_head, value_slot, value_head, own_row, requests_row, scale,
    K, GROUP, HEADS, D, DV, COUNT,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PIECES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One piece of one row's prefix, for up to BLOCK_M pairs of a candidate and a query head of one KV head. `scale` is
    of logits to the base 2; with several pieces, PARTIAL is the piece's attention and WEIGHT the log2 of its sum.
    UPCAST is for the interpreter, whose half precision products are wrong."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(K * GROUP, BLOCK_M)
    kv_head = tl.program_id(1) // blocks
    piece = tl.program_id(2)
    m = (tl.program_id(1) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < K * GROUP
    candidate = row * K + m // GROUP
    head = kv_head * GROUP + m % GROUP
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    at = candidate * query_row + head * query_head
    query = tl.load(QUERY + at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        query = query.to(tl.float32)

    length = tl.load(LENGTHS + row).to(tl.int32)
    size = tl.cdiv(tl.cdiv(length + K, PIECES), BLOCK_N) * BLOCK_N
    begin = piece * size
    end = tl.minimum(begin + size, length + K)
    requests = REQUESTS + tl.load(POOL_ROWS + row) * requests_row
    top = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    found = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        slot = tl.load(requests + n, mask=n < length, other=0).to(tl.int64)
        own = n - length
        slot = tl.where(own < 0, slot, tl.load(OWN + row * own_row + own, mask=(own >= 0) & (own < K), other=0))
        place = slot * key_slot + kv_head * key_head
        there = n < end
        key = tl.load(KEYS + place[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        place = slot * value_slot + kv_head * value_head
        value = tl.load(VALUES + place[:, None] + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        if UPCAST:
            logit = tl.dot(query, key.to(tl.float32)) * scale
        else:
            logit = tl.dot(query, key) * scale
        seen = (own[None, :] < 0) | (own[None, :] == (m // GROUP)[:, None])
        logit = tl.where(seen & there[None, :], logit, NEG_INF)
        higher = tl.maximum(top, tl.max(logit, 1))
        finite = tl.where(higher == NEG_INF, 0.0, higher)
        shrink = tl.exp2(top - finite)
        p = tl.exp2(logit - finite[:, None])
        total = total * shrink + tl.sum(p, 1)
        if UPCAST:
            found = tl.dot(p, value.to(tl.float32), found * shrink[:, None])
        else:
            found = tl.dot(p.to(value.dtype), value, found * shrink[:, None])
        top = higher

    found = found / tl.where(total > 0, total, 1.0)[:, None]
    wanted = inside[:, None] & (dv < DV)[None, :]
    if PIECES == 1:
        tl.store(OUT + (candidate * HEADS + head)[:, None] * DV + dv[None, :], found, mask=wanted)
    else:
        place = (piece * COUNT + candidate) * HEADS + head
        tl.store(WEIGHT + place, top + tl.log2(total), mask=inside)  # -inf of a piece without a token
        if begin < end:
            tl.store(PARTIAL + place[:, None] * DV + dv[None, :], found, mask=wanted)


@triton.jit(do_not_specialize=["COUNT"])
def merge_kernel(
    PARTIAL, WEIGHT, OUT, HEADS, DV, COUNT,
    PIECES: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """OUT of one candidate and BLOCK_G heads: its pieces, by their weights; pieces without a token are not read."""
    candidate = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    dv, piece = tl.arange(0, BLOCK_V), tl.arange(0, PIECES)
    inside = head < HEADS
    place = candidate * HEADS + head
    every = WEIGHT + piece[None, :].to(tl.int64) * COUNT * HEADS + place[:, None]
    weights = tl.load(every, mask=inside[:, None], other=0.0)
    top = tl.max(weights, 1)
    total = tl.sum(tl.exp2(weights - top[:, None]), 1)
    found = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
    for _ in range(PIECES):
        weight = tl.load(WEIGHT + place, mask=inside, other=NEG_INF)
        read = (weight > NEG_INF)[:, None] & (dv < DV)[None, :]
        partial = tl.load(PARTIAL + place[:, None] * DV + dv[None, :], mask=read, other=0.0)
        found += tl.exp2(weight - top)[:, None] * partial
        place += COUNT * HEADS
    place = candidate * HEADS + head
    wanted = inside[:, None] & (dv < DV)[None, :]
    tl.store(OUT + place[:, None] * DV + dv[None, :], found / total[:, None], mask=wanted)


@functools.lru_cache
def _units(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def pieces(programs: int, units: int) -> int:
    """Pieces of a prefix, a power of two: enough to occupy the device, and no more, because each is written once and
    read once more. Does not depend on the lengths, which a captured launch does not know."""
    return min(MOST_PIECES, 1 << max(PROGRAMS_PER_UNIT * units // programs, 1).bit_length() - 1)


def block_m(pairs: int) -> int:
    """Pairs of a candidate and a query head that one program holds: as many as fit into registers."""
    return min(128, max(16, triton.next_power_of_2(pairs)))


def block_n(parts: int) -> int:
    """Tokens of the prefix that a program holds at a time; one that goes through all of it needs its registers for the
    end."""
    return 32 if parts == 1 else 64


def warps(block: int) -> int:
    """Warps of a program of `block_m` pairs, so many that nothing spills."""
    return 4 if block == 16 else 8


def attend_prefix(
    query: Tensor,
    rows: SharedRows,
    k_cache: Tensor,
    v_cache: Tensor,
    scaling: float,
    cut: int | None = None,
) -> Tensor:
    """Launch; arguments as in `lenvm_kernels.dispatch.attend_prefix`.

    Args:
        query, rows, k_cache, v_cache, scaling: as there.
        cut: pieces of each prefix, a power of two. Default: by the device.
    """
    from lenvm_kernels.dispatch import INTERPRETED

    count, heads, width = query.shape
    value_width, kv_heads = v_cache.shape[2], k_cache.shape[1]
    batch, slots = rows.own.shape
    group = heads // kv_heads
    block = block_m(slots * group)
    programs = batch * kv_heads * triton.cdiv(slots * group, block)
    parts = pieces(programs, _units(query.device)) if cut is None else cut
    out = torch.empty(count, heads, value_width, dtype=query.dtype, device=query.device)
    partial, weight = out, out  # not read
    if parts > 1:
        partial = torch.empty(parts, count, heads, value_width, dtype=torch.float32, device=query.device)
        weight = torch.empty(parts, count, heads, dtype=torch.float32, device=query.device)
    block_v = max(16, triton.next_power_of_2(value_width))
    prefix_kernel[(batch, kv_heads * triton.cdiv(slots * group, block), parts)](
        query, k_cache, v_cache, rows.pool_rows, rows.lengths, rows.own, rows.requests, out, partial, weight,
        query.stride(0), query.stride(1), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1),
        rows.own.stride(0), rows.requests.stride(0), scaling * LOG2_E,
        slots, group, heads, width, value_width, count,
        BLOCK_M=block, BLOCK_N=block_n(parts), BLOCK_D=max(16, triton.next_power_of_2(width)), BLOCK_V=block_v,
        PIECES=parts, UPCAST=INTERPRETED, num_warps=warps(block), num_stages=STAGES,
    )  # fmt: skip
    if parts > 1:
        merge_kernel[(count, triton.cdiv(heads, HEADS_AT_ONCE))](
            partial, weight, out, heads, value_width, count,
            PIECES=parts, BLOCK_G=HEADS_AT_ONCE, BLOCK_V=block_v, num_warps=4,
        )  # fmt: skip
    return out
