"""`tilt_sample`: every guidance rule, the draw and the statistics of a row in one program, one launch for a batch.

What concerns a candidate is computed in float64 (a few lanes, so it costs next to nothing): u = sigmoid(z) keeps its
digits near 1, and a bias of 10^6 does not turn rounding into a preference. What concerns a bin of a candidate's length
distribution is float32.

The sum over n of a posterior weight, w(x) = sum_n q(n) K(n), is taken bin by bin in closed form: the probability of n
inside a bin is a triangle over the centres beside it (`lenvm.bins`), and the sums of a triangle against [n = m],
[n <= m], [n >= m] and exp(-|n - m| / width) have one. No table of the size of the longest length is read.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lenvm import guidance as core
from lenvm.bins import LengthBins
from lenvm.candidates import Candidates
from lenvm.definitions import decay_nats
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Mode, Scores
from lenvm.lognormal import lognormal_log_q
from lenvm_kernels.buffers import DrawBuffers
from lenvm_kernels.fused.common import NEG_INF, NO_TOKEN, as_bytes, keyed_gumbel, log_sum_exp, rowwise
from lenvm_kernels.results import WORDS, Status, TiltSample

_AT_MOST = tl.constexpr(int(Mode.AT_MOST))
_AT_LEAST = tl.constexpr(int(Mode.AT_LEAST))
_NONE = tl.constexpr(int(Control.NONE))
_POSTERIOR = tl.constexpr(int(Control.POSTERIOR))
_HARD = tl.constexpr(int(Control.HARD))
_SOFT = tl.constexpr(int(Control.SOFT))
_BIAS = tl.constexpr(int(Control.BIAS))
_FLOOR = tl.constexpr(core.FLOOR)
_OVERRUN = tl.constexpr(core.OVERRUN_TOKENS)
_MIN_TOLERANCE = tl.constexpr(core.MIN_TOLERANCE_TOKENS)
_LIMIT = tl.constexpr(core._TILT_LIMIT)
_EMPTY = tl.constexpr(int(Status.EMPTY))
_BAD = tl.constexpr(int(Status.BAD_SCORES))
_VANISHED = tl.constexpr(int(Status.VANISHED))
# The bisection of the soft rule leaves an interval of 2 * 10^6 / 2^28 = 0.0075. There Newton's error is at most half
# the square of the last one (|third moment| <= variance, as 0 <= u <= 1), so four steps reach float64.
_BISECTIONS = tl.constexpr(28)
_NEWTON_STEPS = tl.constexpr(4)
BLOCK_B = 32
"""Bins of a tile."""
_FILL = tl.constexpr(4096)
"""Logits that one program fills."""


@triton.jit
def one_minus_exp_neg(x):
    """1 - exp(-x), x >= 0, float64, without cancellation."""
    # x (1 - x/2 (1 - x/3 (1 - ...)))
    series = 1.0 - x / 14.0
    for i in tl.static_range(12):
        series = 1.0 - x / (13.0 - i) * series
    return tl.where(x < 0.25, x * series, 1.0 - tl.exp(-x))


@triton.jit
def bin_kernel(CENTRE, b, inside, B, mode, left, tolerance):
    """sum_n DEC[b, n] K(n) of each bin, float64.

    With l < c < h the centres below, at and above (0 below the first, c + 1 above the last), d = c - l and e = h - c,
    DEC[b, n] = triangle(n) / ((d + e) / 2), the triangle rising from 0 at l to 1 at c and falling to 0 at h.
    """
    c = tl.load(CENTRE + b, mask=inside, other=2.0)
    low = tl.load(CENTRE + b - 1, mask=inside & (b > 0), other=0.0)
    high = tl.load(CENTRE + b + 1, mask=b + 1 < B, other=0.0)
    high = tl.where(b + 1 < B, high, c + 1.0)
    d = tl.where(inside, c - low, 1.0)
    e = tl.where(inside, high - c, 1.0)
    norm = 0.5 * (d + e)
    past = left < 0
    m = tl.minimum(tl.maximum(left.to(tl.float64), 0.0), tl.load(CENTRE + B - 1))
    spread = (past & (mode != _AT_LEAST)) | ((left >= 0) & (mode != _AT_MOST) & (mode != _AT_LEAST) & (tolerance > 0))
    if spread:
        # exp(-n/3) past the bound is the same kernel around 0, which is where m is then
        width = tl.where(past, _OVERRUN, tl.maximum(tolerance * m, _MIN_TOLERANCE))
        # sum_n triangle(n) a^|n-m| with a = exp(-1/width), from the second difference of a^|n|:
        # a^|n| = (second difference of a^|n|  +  (1/a - a) [n = 0]) / (1/a + a - 2)
        x = 1.0 / width
        a = tl.exp(-x)
        step = one_minus_exp_neg(x)
        curvature = step * step / a
        triangle = tl.where(m <= c, tl.maximum(m - low, 0.0) / d, tl.maximum(high - m, 0.0) / e)
        ends = tl.exp(-tl.abs(m - low) * x) / d + tl.exp(-tl.abs(m - high) * x) / e
        middle = tl.exp(-tl.abs(m - c) * x) * (1.0 / d + 1.0 / e)
        total = (1.0 + a) / step * triangle + (ends - middle) / curvature
        per_bin = tl.maximum(total, 0.0) / norm
    else:
        rise_to = tl.minimum(tl.maximum(m - low, 0.0), d)
        fall_to = tl.minimum(tl.maximum(m - c, 0.0), e - 1.0)
        at_most = rise_to * (rise_to + 1.0) / (2.0 * d) + fall_to * (2.0 * e - fall_to - 1.0) / (2.0 * e)
        rise_from = tl.minimum(tl.maximum(m - low, 1.0), d + 1.0)
        fall_from = tl.minimum(tl.maximum(high - m, 0.0), e - 1.0)
        at_least = (d - rise_from + 1.0) * (d + rise_from) / (2.0 * d) + fall_from * (fall_from + 1.0) / (2.0 * e)
        exact = tl.where(m <= c, tl.maximum(m - low, 0.0) / d, tl.maximum(high - m, 0.0) / e)
        total = tl.where(mode == _AT_MOST, at_most, tl.where(mode == _AT_LEAST, at_least, exact))
        per_bin = tl.where(past, 1.0, total / norm)  # past the bound only at_least comes here
    return per_bin


@triton.jit
def kernel_at_zero(mode, left, tolerance, longest):
    """K(0), float64: the weight of a stop token."""
    m = tl.minimum(tl.maximum(left, 0).to(tl.float64), longest)
    exact = tl.where(left <= 0, 1.0, 0.0 * m)
    about = tl.exp(-m / tl.maximum(tolerance * m, _MIN_TOLERANCE))
    within = tl.where((mode != _AT_LEAST) & (tolerance > 0), about, exact)
    return tl.where((mode == _AT_MOST) | (left < 0), 1.0, within)


@triton.jit
def expectation(log_p, u, beta):
    """E[u] and Var[u] under p exp(beta u)."""
    y = log_p + beta * u
    w = tl.exp(y - tl.max(y, 0))
    total = tl.sum(w, 0)
    mean = tl.sum(w * u, 0) / total
    return mean, tl.sum(w * (u - mean) * (u - mean), 0) / total


@triton.jit
def matching_beta(log_p, u, wanted, mode):
    """beta with E[u] = wanted, within +-10^6; 0 where the base already keeps its bound."""
    low = wanted * 0.0 - _LIMIT
    high = wanted * 0.0 + _LIMIT
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        y = log_p + middle * u
        w = tl.exp(y - tl.max(y, 0))
        too_short = tl.sum(w * u, 0) < wanted * tl.sum(w, 0)
        low = tl.where(too_short, middle, low)
        high = tl.where(too_short, high, middle)
    beta = 0.5 * (low + high)
    for _ in range(_NEWTON_STEPS):
        mean, variance = expectation(log_p, u, beta)
        step = (wanted - mean) / tl.where(variance > 0, variance, 1.0)
        beta = tl.where(variance > 0, tl.minimum(tl.maximum(beta + step, low), high), beta)
    base, _variance = expectation(log_p, u, wanted * 0.0)
    satisfied = ((mode == _AT_MOST) & (base <= wanted)) | ((mode == _AT_LEAST) & (base >= wanted))
    return tl.where(satisfied, 0.0, beta)


@triton.jit
def hard_choice(kept, stop, raw, token, z, wanted, mode):
    """Which slot the paper's rule takes; values in float32 as in the reference, so that both see the same ties."""
    one_minus_u = tl.where(stop, 1.0, 1.0 / (1.0 + tl.exp(z))).to(tl.float32)
    distance = tl.abs(one_minus_u - wanted.to(tl.float32))
    cost = tl.where(mode == _AT_MOST, -one_minus_u, tl.where(mode == _AT_LEAST, one_minus_u, distance))
    cost = tl.where(kept, cost, float("inf"))
    best = kept & (cost == tl.min(cost, 0))
    best = best & (raw == tl.max(tl.where(best, raw, NEG_INF), 0))
    return best & (token == tl.min(tl.where(best, token, NO_TOKEN), 0))


# a kernel for each number of rows would take long to compile
@triton.jit(do_not_specialize=["K", "R"], do_not_specialize_on_alignment=["SLOT", "CHOSEN", "STATS", "STATUS"])
def tilt_sample_kernel(
    LOG_P, TOKEN, STOP, Z, LOG_Q, CENTRE, MEAN, DECAY,
    MODE, CONTROL, TARGET, EMITTED, SHARPNESS, TOLERANCE, BIAS, SEED, GREEDY,
    OUT, SLOT, CHOSEN, STATS, STATUS,
    LOGITS, INDEX, KEPT_SLOT, POOL_ROW, SCRATCH, RULED_BY,
    log_p_row, token_row, stop_row, z_row, log_q_row, log_q_slot,
    mode_row, control_row, target_row, emitted_row, sharpness_row, tolerance_row, bias_row, seed_row, greedy_row,
    logits_row, scratch_row,
    K, B, R, V,
    BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, HAS_Q: tl.constexpr, LENGTH_FROM_Q: tl.constexpr,
    WRITE: tl.constexpr, INDEXED: tl.constexpr, REMEMBER: tl.constexpr, RULED: tl.constexpr,
):  # fmt: skip
    """One row: [K] candidates, [K, B] length log-probabilities; with RULED, another row says how. With WRITE, further
    programs of the row fill its logits, all but those of its candidates, which are left to the first."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    if WRITE:
        batch_row = tl.load(INDEX + row) if INDEXED else row
        if tl.program_id(1) > 0:
            v = (tl.program_id(1) - 1) * _FILL + tl.arange(0, _FILL)
            other = v < V
            for j in range(K):
                other = other & (tl.load(TOKEN + row * token_row + j) != v)
            tl.store(LOGITS + batch_row * logits_row + v, NEG_INF, mask=other)
            return
    inside = k < K
    rule = tl.load(RULED_BY + row) if RULED else row
    mode = tl.load(MODE + rule * mode_row).to(tl.int32)
    control = tl.load(CONTROL + rule * control_row).to(tl.int32)
    emitted = tl.load(EMITTED + row * emitted_row)
    left = tl.load(TARGET + rule * target_row) - emitted - 1
    decay = tl.load(DECAY)

    raw = tl.load(LOG_P + row * log_p_row + k, mask=inside, other=NEG_INF)
    token = tl.load(TOKEN + row * token_row + k, mask=inside, other=NO_TOKEN)
    stop = tl.load(STOP + row * stop_row + k, mask=inside, other=0) != 0
    kept = raw > NEG_INF  # NaN is not
    scored = kept & ~stop
    z = tl.load(Z + row * z_row + k, mask=scored, other=0.0).to(tl.float64)
    log_p = tl.where(kept, raw, NEG_INF).to(tl.float64)
    u = tl.where(scored, 1.0 / (1.0 + tl.exp(-z)), 0.0)
    empty = tl.max(kept.to(tl.int32), 0) == 0
    bad_z = tl.max((scored & (z != z)).to(tl.int32), 0) > 0
    base = tl.where(kept, log_p - tl.where(empty, 0.0, log_sum_exp(log_p)), NEG_INF)
    # one_minus_u of the target; past the bound: the shortest
    wanted = tl.exp(-tl.maximum(left, 0).to(tl.float64) * decay)

    length = tl.where(scored, (tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))) / decay, 0.0)
    guided = base
    steered = (control != _NONE) & ~empty
    bad = (control != _NONE) & (control != _POSTERIOR) & bad_z
    vanished = control < 0  # false
    if HAS_Q:
        tolerance = tl.load(TOLERANCE + rule * tolerance_row).to(tl.float64)
        # softmax over the bins in one reading: every lane keeps the highest logit it has met, and its sums relative to
        # that; a tile of few bins at a time keeps the float64 of `bin_kernel` in registers
        highest = tl.full((BLOCK_K, BLOCK_B), NEG_INF, tl.float32)
        mass = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
        fit = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
        tokens = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
        for start in range(0, B, BLOCK_B):
            b = start + tl.arange(0, BLOCK_B)
            in_bins = b < B
            place = LOG_Q + row * log_q_row + k[:, None] * log_q_slot + b[None, :]
            log_q = tl.load(place, mask=scored[:, None] & in_bins[None, :], other=NEG_INF)
            sound = log_q < float("inf")  # NaN is not
            new = tl.maximum(highest, tl.where(sound, log_q, NEG_INF))
            anchor = tl.where(new == NEG_INF, 0.0, new)
            rescale = tl.exp(highest - anchor)
            q = tl.where(sound, tl.exp(log_q - anchor), float("nan"))  # stays in the sums
            highest = new
            mass = mass * rescale + q
            if LENGTH_FROM_Q:
                tokens = tokens * rescale + q * tl.load(MEAN + b, mask=in_bins, other=0.0)[None, :]
            if control == _POSTERIOR:
                per_bin = bin_kernel(CENTRE, b, in_bins, B, mode, left, tolerance)
                fit = fit * rescale + q * per_bin.to(tl.float32)[None, :]
        top = tl.max(highest, 1)
        rescale = tl.exp(highest - tl.where(top == NEG_INF, 0.0, top)[:, None])
        total_mass = tl.sum(mass * rescale, 1)
        share = tl.where(total_mass > 0, 1.0 / tl.where(total_mass > 0, total_mass, 1.0), 0.0)
        if LENGTH_FROM_Q:
            length = tl.where(scored, (tl.sum(tokens * rescale, 1) * share).to(tl.float64), 0.0)
        if control == _POSTERIOR:
            weight = (tl.sum(fit * rescale, 1) * share).to(tl.float64)
            at_zero = kernel_at_zero(mode, left, tolerance, tl.load(CENTRE + B - 1))
            weight = tl.where(kept, tl.where(stop, at_zero, weight), 0.0)
            bad = tl.max((scored & (total_mass != total_mass)).to(tl.int32), 0) > 0
            vanished = ~bad & (tl.max(weight, 0) <= _FLOOR) & ~empty
            sharpness = tl.load(SHARPNESS + rule * sharpness_row).to(tl.float64)
            guided = base + sharpness * tl.log(weight + _FLOOR)
    if control == _BIAS:
        guided = base + tl.load(BIAS + rule * bias_row).to(tl.float64) * u
    if control == _HARD:
        best = hard_choice(kept, stop, raw, token, z, wanted, mode)
        guided = tl.where(best, wanted * 0.0, NEG_INF)
        steered = steered & ~((mode == _AT_LEAST) & (left <= 0))
    if (control == _SOFT) & ~empty & ~bad:
        guided = base + matching_beta(base, u, 1.0 - wanted, mode) * u
    guided = tl.where(kept, guided, NEG_INF)
    total = log_sum_exp(guided)
    # NaN and infinities fail both comparisons: such a row keeps p
    steered = steered & ~bad & ~vanished & (total > NEG_INF) & (total < float("inf"))
    guided = tl.where(steered & kept, guided - tl.where(steered, total, 0.0), base)
    out = tl.where(steered, guided.to(tl.float32), raw)  # not steered: the loaded bits
    tl.store(OUT + row * K + k, out, mask=inside)

    score = tl.where(kept, out, NEG_INF).to(tl.float64)
    if tl.load(GREEDY + rule * greedy_row) == 0:
        score = score + keyed_gumbel(tl.load(SEED + rule * seed_row), emitted, token)
    best = inside & (score == tl.max(score, 0))
    chosen = tl.min(tl.where(best, token, NO_TOKEN), 0)
    slot = tl.min(tl.where(best & (token == chosen), k, BLOCK_K), 0)
    tl.store(SLOT + row, slot.to(tl.int64))
    tl.store(CHOSEN + row, chosen)
    if WRITE:
        one_hot = tl.where(token == chosen, 0.0, NEG_INF)  # an empty slot may name the token of another
        tl.store(LOGITS + batch_row * logits_row + token, one_hot, mask=inside)
    if REMEMBER:
        tl.store(KEPT_SLOT + tl.load(POOL_ROW + row), tl.load(SCRATCH + row * scratch_row + slot))

    here = k == slot
    p = tl.where(kept, tl.exp(guided), 0.0)
    alive = p > 0
    kl = tl.sum(tl.where(alive & steered, p * (guided - base), 0.0), 0)
    tl.store(STATS + row, tl.sum(tl.where(here, length, 0.0), 0).to(tl.float32))
    tl.store(STATS + R + row, -tl.sum(tl.where(here, u, 0.0), 0).to(tl.float32))
    tl.store(STATS + 2 * R + row, -tl.sum(tl.where(alive, p * u, 0.0), 0).to(tl.float32))
    tl.store(STATS + 3 * R + row, tl.maximum(kl, 0.0).to(tl.float32))
    bits = tl.where(empty, _EMPTY, tl.where(bad, _BAD, tl.where(vanished, _VANISHED, 0)))
    tl.store(STATUS + row, bits.to(tl.int32))


@cache
def _tables(centres: tuple[int, ...], gamma: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Centres [B] float64, bin means [B] float32, |ln gamma| [1] float64 on the device; made once, and kept, because a
    CUDA graph goes on reading them."""
    decay = torch.tensor([decay_nats(gamma)], dtype=torch.float64, device=device)
    if not centres:
        return decay, decay.float(), decay
    bins = LengthBins.cached(centres)
    return bins.table("centre_tensor", device), bins.table("means", device), decay


def tilt_sample(
    candidates: Candidates,
    scores: Scores,
    guidance: GuidanceRows,
    lenvm: LenvmConfig,
    seed: Tensor,
    greedy: Tensor,
    present: Collection[Control] | None,
    into: DrawBuffers | None = None,
    ruled_by: Tensor | None = None,
) -> TiltSample:
    """Launch; arguments as in `lenvm_kernels.dispatch.tilt_sample`."""
    log_q, centres = scores.length_log_q, tuple(lenvm.bins)
    from_q = log_q is not None
    if log_q is None and (present is None or Control.POSTERIOR in present):
        log_q, bins = lognormal_log_q(scores.z, lenvm)
        centres = bins.centres
    log_p, token_ids, stop, z = map(
        rowwise, (candidates.log_p.float(), candidates.token_ids, as_bytes(candidates.is_stop), scores.z)
    )
    rows, slots = log_p.shape
    device = log_p.device
    centre, mean, decay = _tables(centres, lenvm.gamma, device)
    quantities = rowwise(log_q.float()) if log_q is not None else log_p[..., None]
    out = torch.empty(rows, slots, dtype=torch.float32, device=device)
    memory = None if into is None else into.results
    if memory is None:
        memory = torch.empty(WORDS, rows, dtype=torch.int64, device=device)
    assert memory.shape == (WORDS, rows), "the kernel finds the statistics by R"
    sample = TiltSample.in_memory(out, memory)
    slot = sample.slot
    g = guidance
    row_values = (g.mode, g.control, g.target, g.emitted, g.sharpness, g.tolerance, g.bias, seed, as_bytes(greedy))
    block_k = max(16, triton.next_power_of_2(slots))
    buffers, vocabulary, options = (slot,) * 5, 0, {"WRITE": False, "INDEXED": False, "REMEMBER": False}  # not read
    ruling = slot if ruled_by is None else ruled_by
    if into is not None:
        logits, index, kept = (slot if t is None else t for t in (into.logits, into.rows, into.chosen))
        if into.logits is not None:
            assert logits.stride(-1) == 1, "the kernel writes to rows of adjacent logits"
            vocabulary = logits.shape[1]
        buffers = (logits, index, kept, into.pool_rows, rowwise(into.scratch))
        names = ("WRITE", "INDEXED", "REMEMBER")
        options = dict(zip(names, (t is not None for t in (into.logits, into.rows, into.chosen)), strict=True))
    tilt_sample_kernel[(rows, 1 + triton.cdiv(vocabulary, _FILL.value))](
        log_p, token_ids, stop, z, quantities, centre, mean, decay, *row_values,
        out, slot, sample.token_id, sample.length, sample.status, *buffers, ruling,
        log_p.stride(0), token_ids.stride(0), stop.stride(0), z.stride(0), quantities.stride(0), quantities.stride(1),
        *(value.stride(0) for value in row_values), buffers[0].stride(0), buffers[4].stride(0),
        slots, len(centres), rows, vocabulary,
        BLOCK_K=block_k, BLOCK_B=BLOCK_B, HAS_Q=log_q is not None,
        LENGTH_FROM_Q=from_q, **options, RULED=ruled_by is not None, num_warps=warps(block_k, log_q is not None),
    )  # fmt: skip
    return sample


def warps(block_k: int, has_q: bool) -> int:
    """Warps of a program: with eight elements of a tile of bins for each thread the compiler spills nothing up to
    64 candidates."""
    return max(1, block_k // 8) if has_q else 1
