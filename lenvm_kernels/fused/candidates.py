"""`build_candidates`: the host's sampling filters on the most probable tokens, given by torch's top-k.

Order does not depend on the temperature, so the top-k runs on the logits as they are. Of several equal logits at its
end it takes any; `cut_kernel` then reads the row once more and takes those of the lowest ids. NaN comes first in a
top-k, so a row with NaN logits has fewer candidates, or none. top-p without a top-k is relative to the whole
vocabulary: where a row has one, `mass_kernel` sums it in one reading, split over programs, and leaves the stop tokens
out, because whether they count is known only later; `cut_kernel` adds them. A row at its strict bound takes its
candidates from the stop tokens instead of from the top-k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lenvm.candidates import LARGEST_LOGIT, Candidates, SamplingRows
from lenvm.guidance import Control, GuidanceRows, Mode
from lenvm_kernels.fused.common import NEG_INF, NO_TOKEN, as_bytes, log_sum_exp, rowwise

CHUNK = 8192
"""Logits that one program of `mass_kernel` sums."""
_SCAN = tl.constexpr(4096)
"""Logits that `lowest_ids` reads at a time."""

_LARGEST = tl.constexpr(LARGEST_LOGIT)
_AT_MOST = tl.constexpr(int(Mode.AT_MOST))
_AT_LEAST = tl.constexpr(int(Mode.AT_LEAST))
_NONE = tl.constexpr(int(Control.NONE))
_BIAS = tl.constexpr(int(Control.BIAS))


@triton.jit
def clean(x):
    """A logit as float32: NaN is -inf (impossible), nothing is above the largest, -0 is 0."""
    x = x.to(tl.float32) + 0.0
    return tl.where(x == x, tl.minimum(x, _LARGEST), NEG_INF)


@triton.jit
def mass_kernel(
    LOGITS, TEMPERATURE, STOPS, MASS, logits_row, temperature_row, stops_row, V, S, PARTS,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """MASS[row, part] = (max, sum exp(x - max)) of the scaled logits of one chunk, stop tokens left out."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    temperature = tl.load(TEMPERATURE + row * temperature_row)
    top = tl.full((BLOCK,), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        v = part * CHUNK + start + tl.arange(0, BLOCK)
        x = clean(tl.load(LOGITS + row * logits_row + v, mask=v < V, other=NEG_INF)) / temperature
        for s in range(S):
            x = tl.where(tl.load(STOPS + row * stops_row + s) == v, NEG_INF, x)
        new = tl.maximum(top, x)
        finite = tl.where(new == NEG_INF, 0.0, new)
        total = total * tl.exp(top - finite) + tl.exp(x - finite)
        top = new
    highest = tl.max(top, 0)
    finite = tl.where(highest == NEG_INF, 0.0, highest)
    place = MASS + (row * PARTS + part) * 2
    tl.store(place, highest)
    tl.store(place + 1, tl.sum(total * tl.exp(top - finite), 0))


@triton.jit
def sort_descending(value, token):
    """(value, token) by value, the larger first; equal values by token id, the lower first."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # order of the integers = order of the floats
    key = (ordered.to(tl.int64) << 32) | (token.to(tl.int64) * -1 + NO_TOKEN)
    key = tl.sort(key, descending=True)
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), (key & 0xFFFFFFFF) * -1 + NO_TOKEN


@triton.jit
def lowest_ids(LOGITS, TOP, TOP_ID, N, V):
    """Of one row: put the lowest ids among the tokens that equal the last of the N most probable into TOP_ID, in order,
    if the top-k had to choose between them, which TOP [N + 1] shows."""
    edge = tl.load(TOP + N - 1).to(tl.float32)
    if (tl.load(TOP + N).to(tl.float32) == edge) & (edge > NEG_INF):
        found = 0
        while tl.load(TOP + found).to(tl.float32) != edge:
            found += 1
        start = 0
        while (found < N) & (start < V):
            v = start + tl.arange(0, _SCAN)
            hit = tl.load(LOGITS + v, mask=v < V, other=NEG_INF).to(tl.float32) == edge
            place = found + tl.cumsum(hit.to(tl.int32), 0) - 1
            tl.store(TOP_ID + place, v.to(tl.int64), mask=hit & (place < N))
            found += tl.sum(hit.to(tl.int32), 0)
            start += _SCAN
        tl.debug_barrier()  # other threads read what was written


@triton.jit
def cut_kernel(
    LOGITS, TOP, TOP_ID, MASS, STOPS, TEMPERATURE, TOP_K, TOP_P, MIN_P,
    MODE, CONTROL, TARGET, EMITTED, STRICT,
    TOKEN, LOG_P, IS_STOP,
    logits_row, stops_row, temperature_row, top_k_row, top_p_row, min_p_row,
    mode_row, control_row, target_row, emitted_row, strict_row,
    V, S, N, TOP_ROW, PARTS, WIDTH,
    BLOCK_N: tl.constexpr, BLOCK_PARTS: tl.constexpr, BOUNDS: tl.constexpr, FILTERED: tl.constexpr,
    TIES: tl.constexpr, MASSES: tl.constexpr,
):  # fmt: skip
    """One row: its N most probable tokens, filtered, cut to WIDTH and normalised."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    if TIES:
        lowest_ids(LOGITS + row * logits_row, TOP + row * TOP_ROW, TOP_ID + row * TOP_ROW, N, V)
    value = clean(tl.load(TOP + row * TOP_ROW + n, mask=inside, other=NEG_INF))
    token = tl.load(TOP_ID + row * TOP_ROW + n, mask=inside, other=NO_TOKEN)
    temperature = tl.load(TEMPERATURE + row * temperature_row)

    # the row's own stop tokens, each once, in slots 0..S-1
    stop_id = tl.load(STOPS + row * stops_row + n, mask=n < S, other=-1)
    given = (stop_id >= 0) & (stop_id < V)
    for s in range(S):
        given = given & ~((n > s) & (stop_id == tl.load(STOPS + row * stops_row + s)))
    stop_value = clean(tl.load(LOGITS + row * logits_row + stop_id, mask=given, other=NEG_INF))

    ban = row < 0
    force = row < 0
    if BOUNDS:
        mode = tl.load(MODE + row * mode_row)
        control = tl.load(CONTROL + row * control_row)
        left = tl.load(TARGET + row * target_row) - tl.load(EMITTED + row * emitted_row) - 1
        strict = (tl.load(STRICT + row * strict_row) != 0) & (control != _NONE) & (control != _BIAS)
        ban = strict & (mode != _AT_MOST) & (left > 0)
        force = strict & (mode != _AT_LEAST) & (left <= 0)
        force = force & (tl.max(stop_value, 0) > NEG_INF)
    value = tl.where(force, stop_value, value)
    token = tl.where(force, tl.where(given, stop_id, NO_TOKEN), token)
    is_stop = token < 0
    for s in range(S):
        is_stop = is_stop | (token == tl.load(STOPS + row * stops_row + s))
    # nothing but stop tokens allowed (by a grammar, say): a ban cannot hold
    ban = ban & (tl.max(tl.where(is_stop, NEG_INF, value), 0) > NEG_INF)
    value = tl.where(ban & is_stop, NEG_INF, value)

    value, token = sort_descending(value, token)
    x = value / temperature
    top = tl.max(x, 0)
    top = tl.where(top == NEG_INF, 0.0, top)
    weight = tl.exp(x - top)
    keep = (weight > 0) & (n < WIDTH)
    if FILTERED:
        top_k = tl.load(TOP_K + row * top_k_row)
        within = tl.where(n < top_k, weight, 0.0)
        total = tl.sum(within, 0)
        top_p = tl.load(TOP_P + row * top_p_row)
        if MASSES and (top_k >= V) & ~force:
            part = tl.arange(0, BLOCK_PARTS)
            place = MASS + (row * PARTS + part) * 2
            part_top = tl.load(place, mask=part < PARTS, other=NEG_INF)
            total = tl.sum(tl.load(place + 1, mask=part < PARTS, other=0.0) * tl.exp(part_top - top), 0)
            total += tl.where(ban, 0.0, tl.sum(tl.exp(stop_value / temperature - top), 0))
        total = tl.where(top_p < 1, total, float("inf"))  # it may round to less than the sum of its parts
        before = tl.cumsum(within, 0) - within
        keep = keep & (n < top_k) & (before <= top_p * total)
        keep = keep & (weight >= tl.load(MIN_P + row * min_p_row))
        keep = keep | ((n == 0) & (weight > 0))
    log_p = tl.where(keep, x, NEG_INF)
    log_p = tl.where(keep, log_p - log_sum_exp(log_p), NEG_INF)

    is_stop = token < 0
    for s in range(S):
        is_stop = is_stop | (token == tl.load(STOPS + row * stops_row + s))
    token = tl.where(token == NO_TOKEN, 0, token)  # an empty slot still names a token that exists
    tl.store(TOKEN + row * WIDTH + n, token, mask=n < WIDTH)
    tl.store(LOG_P + row * WIDTH + n, log_p, mask=n < WIDTH)
    tl.store(IS_STOP + row * WIDTH + n, is_stop.to(tl.uint8), mask=n < WIDTH)


def build_candidates(
    logits: Tensor,
    sampling: SamplingRows,
    stop_token_ids: Tensor,
    max_candidates: int,
    guidance: GuidanceRows | None,
    reach: int,
    into: Candidates | None,
) -> Candidates:
    """Launch; arguments as in `lenvm_kernels.dispatch.build_candidates`."""
    logits, stops = rowwise(logits), rowwise(stop_token_ids)
    rows, vocabulary = logits.shape
    stop_count = stops.shape[1]
    width = min(max_candidates, vocabulary)
    # a banned row loses up to all of its stop tokens
    count = min(max(reach, width) + (0 if guidance is None else stop_count), vocabulary)
    # one more than is read shows whether its choice among equals matters
    top, top_id = torch.topk(logits, min(count + 1, vocabulary), dim=-1)
    parts = triton.cdiv(vocabulary, CHUNK)
    device = logits.device
    mass = torch.empty(rows, parts, 2, dtype=torch.float32, device=device)
    temperature = sampling.temperature
    masses = not (sampling.unfiltered or sampling.no_whole_top_p)
    if masses:
        mass_kernel[(rows, parts)](
            logits, temperature, stops, mass, logits.stride(0), temperature.stride(0), stops.stride(0),
            vocabulary, stop_count, parts, CHUNK=CHUNK, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    if into is None:
        dtypes = torch.int64, torch.float32, torch.bool
        into = Candidates(*(torch.empty(rows, width, dtype=dtype, device=device) for dtype in dtypes))
    filters = (temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    bounds = (
        (sampling.top_k,) * 5  # not read
        if guidance is None
        else (guidance.mode, guidance.control, guidance.target, guidance.emitted, as_bytes(guidance.strict))
    )
    block = max(16, triton.next_power_of_2(max(count, stop_count)))
    cut_kernel[(rows,)](
        logits, top, top_id, mass, stops, *filters, *bounds, into.token_ids, into.log_p, as_bytes(into.is_stop),
        logits.stride(0), stops.stride(0), *(f.stride(0) for f in filters), *(b.stride(0) for b in bounds),
        vocabulary, stop_count, count, top.shape[1], parts, width,
        BLOCK_N=block, BLOCK_PARTS=triton.next_power_of_2(parts), BOUNDS=guidance is not None,
        FILTERED=not sampling.unfiltered, TIES=count < vocabulary, MASSES=masses, num_warps=4,
    )  # fmt: skip
    return Candidates(into.token_ids, into.log_p, into.is_stop)  # what `into` may know of its last contents is past
