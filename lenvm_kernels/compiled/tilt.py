"""`tilt_sample`: every guidance rule, the draw and the statistics of a row in one call for a batch, all in float64."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from math import exp, log, log1p
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lenvm import guidance as core
from lenvm.bins import LengthBins
from lenvm.candidates import Candidates
from lenvm.definitions import decay_nats
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Mode, Scores, kernel_per_bin, kernel_table
from lenvm.lognormal import lognormal_log_q
from lenvm_kernels.buffers import DrawBuffers
from lenvm_kernels.compiled.common import NEG_INF, compiled, keyed_gumbel, position_key
from lenvm_kernels.reference import write_draw
from lenvm_kernels.results import Status, TiltSample

_AT_MOST, _AT_LEAST = int(Mode.AT_MOST), int(Mode.AT_LEAST)
_NONE, _POSTERIOR, _HARD = int(Control.NONE), int(Control.POSTERIOR), int(Control.HARD)
_SOFT, _BIAS = int(Control.SOFT), int(Control.BIAS)
_MODES = len(Mode)
_FLOOR, _LIMIT, _STEPS = core.FLOOR, core._TILT_LIMIT, core._TILT_STEPS
_EMPTY, _BAD, _VANISHED = int(Status.EMPTY), int(Status.BAD_SCORES), int(Status.VANISHED)
LENGTH, VALUE, EXPECTED_VALUE, KL = range(4)
"""Rows of the statistics."""


@compiled()
def log_sum_exp(x):
    """ln sum exp x of [K]; -inf where all are, NaN where one is NaN or +inf."""
    highest = NEG_INF
    for k in range(len(x)):
        highest = x[k] if x[k] > highest or np.isnan(x[k]) else highest
    if highest == NEG_INF:
        return highest
    total = 0.0
    for k in range(len(x)):
        total += exp(x[k] - highest)
    return highest + log(total)


@compiled(fastmath=("reassoc", "contract"))
def weigh(q, kernel):
    """sum over bins of q [B] times its kernel, [1 + B] from the second on, and of q; the sums in any order."""
    weight, mass = 0.0, 0.0
    for b in range(len(q)):
        weight += q[b] * kernel[1 + b]
        mass += q[b]
    return weight, mass


@compiled()
def expectation(log_p, u, beta):
    """E[u] under p exp(beta u), p [K] not normalised."""
    highest = NEG_INF
    for k in range(len(u)):
        highest = max(highest, log_p[k] + beta * u[k])
    total, mean = 0.0, 0.0
    for k in range(len(u)):
        weight = exp(log_p[k] + beta * u[k] - highest)
        total += weight
        mean += weight * u[k]
    return mean / total


@compiled()
def matching_beta(log_p, u, wanted, mode):
    """beta with E[u] = wanted, within +-10^6; 0 where the base already keeps its bound."""
    base = expectation(log_p, u, 0.0)
    if (mode == _AT_MOST and base <= wanted) or (mode == _AT_LEAST and base >= wanted):
        return 0.0
    low, high = -_LIMIT, _LIMIT
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        if expectation(log_p, u, middle) < wanted:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


@compiled()
def hard_choice(kept, stop, raw, token, z, wanted, mode):
    """Which slot the paper's rule takes; values in float32 as in the reference, so that both see the same ties."""
    best, best_cost = 0, np.float32(np.inf)
    for k in range(len(z)):
        if not kept[k]:
            continue
        one_minus_u = np.float32(1.0) if stop[k] else np.float32(1.0 / (1.0 + exp(z[k])))
        cost = np.float32(abs(one_minus_u - np.float32(wanted)))
        if mode == _AT_MOST:
            cost = -one_minus_u
        elif mode == _AT_LEAST:
            cost = one_minus_u
        nearer = cost < best_cost
        if cost == best_cost:
            nearer = raw[k] > raw[best] or (raw[k] == raw[best] and token[k] < token[best])
        if nearer:
            best, best_cost = k, cost
    return best


@compiled()
def write(logits, rows, tokens, slots, chosen, pool_rows, scratch):
    """`lenvm_kernels.reference.write_draw`; no `rows` are all, without `logits` none becomes one-hot, and without
    `chosen` nothing is noted."""
    for r in range(len(tokens)):
        if len(logits):
            row = logits[rows[r] if len(rows) else r]
            row[:] = NEG_INF
            row[tokens[r]] = 0.0
        if len(chosen):
            chosen[pool_rows[r]] = scratch[r, slots[r]]


@compiled(
    "Tuple((f4[:,::1], i8[::1], i8[::1], f4[:,::1], i4[::1]))"
    "(f4[:,:], i8[:,:], b1[:,:], f4[:,:], f4[:,:,:], f4[:,:], b1, f4[:], f8,"
    " i8[:], i8[:], i8[:], i8[:], f4[:], f4[:], i8[:], b1[:], b1,"
    " f4[:,::1], i8[:], i8[:], i8[:], i8[:,:])"
)
def guide_and_draw(
    log_p, tokens, stops, z, q, kernels, by_row, means, decay,
    modes, controls, targets, emitted, sharpness, biases, seeds, greedy, with_statistics,
    logits, batch_rows, chosen_slots, pool_rows, scratch,
):  # fmt: skip
    """Rows [R] of candidates [R, K] with length probabilities [R, K, B]. `kernels` [..., 1 + B], the weight of a stop
    token and of each bin, has a line for each row, or is `lenvm.guidance.kernel_table`. It or `means` [B] may be empty,
    if no row is a posterior's or no length of a distribution is wanted. Without statistics those rows are not to be
    read, except of lengths. What follows them is `write`'s."""
    rows, slots = log_p.shape
    counted, reach = len(means), kernels.shape[0] // _MODES
    out = np.empty((rows, slots), np.float32)
    slot, chosen = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    statistics = np.zeros((4, rows), np.float32)
    status = np.zeros(rows, np.int32)
    kept, scored = np.empty(slots, np.bool_), np.empty(slots, np.bool_)
    base, guided, u, values = np.empty(slots), np.empty(slots), np.empty(slots), np.empty(slots)
    for r in range(rows):
        mode, control = modes[r], controls[r]
        left = targets[r] - emitted[r] - 1
        reads_u = with_statistics or control != _POSTERIOR
        empty, bad_z = True, False
        for k in range(slots):
            kept[k] = log_p[r, k] > NEG_INF  # NaN is not
            scored[k] = kept[k] and not stops[r, k]
            base[k] = log_p[r, k] if kept[k] else NEG_INF
            values[k] = z[r, k] if scored[k] else 0.0
            u[k] = 1.0 / (1.0 + exp(-values[k])) if scored[k] and reads_u else 0.0
            empty &= not kept[k]
            bad_z |= np.isnan(values[k])
        total = log_sum_exp(base)
        for k in range(slots):
            base[k] = base[k] - total if kept[k] else NEG_INF
            guided[k] = base[k]
        wanted = exp(-max(left, 0) * decay)  # one minus u of the target; past the bound: the shortest
        steered = control != _NONE and not empty
        bad = control != _NONE and control != _POSTERIOR and bad_z
        vanished = False
        if steered and control == _POSTERIOR:
            most = 0.0
            kernel = kernels[r if by_row else mode * reach + min(max(left + 1, 0), reach - 1)]
            for k in range(slots):
                weight = kernel[0] if kept[k] else 0.0
                if scored[k]:
                    weight, mass = weigh(q[r, k], kernel)
                    bad |= not mass < np.inf
                most = max(most, weight)
                guided[k] += sharpness[r] * log(weight + _FLOOR)
            vanished = not bad and most <= _FLOOR
        elif steered and control == _BIAS:
            for k in range(slots):
                guided[k] += biases[r] * u[k]
        elif steered and control == _HARD and not bad:
            if mode == _AT_LEAST and left <= 0:
                steered = False
            else:
                best = hard_choice(kept, stops[r], log_p[r], tokens[r], values, wanted, mode)
                guided[:] = NEG_INF
                guided[best] = 0.0
        elif steered and control == _SOFT and not bad:
            beta = matching_beta(base, u, 1.0 - wanted, mode)
            for k in range(slots):
                guided[k] += beta * u[k]
        for k in range(slots):
            guided[k] = guided[k] if kept[k] else NEG_INF
        total = log_sum_exp(guided)
        # NaN and infinities fail both comparisons: such a row keeps p
        steered = steered and not bad and not vanished and total > NEG_INF and total < np.inf

        best_score = NEG_INF
        best = 0
        key = position_key(seeds[r], emitted[r])
        expected, divergence = 0.0, 0.0
        for k in range(slots):
            log_guided = guided[k] - total if steered and kept[k] else base[k]
            out[r, k] = log_guided if steered else log_p[r, k]  # not steered: the loaded bits
            score = NEG_INF
            if kept[k]:
                score = float(out[r, k])
                if not greedy[r]:
                    score += keyed_gumbel(key, tokens[r, k])
                if with_statistics:
                    p = exp(log_guided)
                    expected -= p * u[k]
                    if steered and p > 0.0:
                        divergence += p * (log_guided - base[k])
            if score > best_score or (score == best_score and tokens[r, k] < tokens[r, best]):
                best, best_score = k, score
        slot[r], chosen[r] = best, tokens[r, best]
        if scored[best]:
            statistics[VALUE, r] = -u[best]
            length = (max(values[best], 0.0) + log1p(exp(-abs(values[best])))) / decay
            if counted:
                length = 0.0
                for b in range(counted):
                    length += q[r, best, b] * means[b]
            statistics[LENGTH, r] = length
        statistics[EXPECTED_VALUE, r] = expected
        statistics[KL, r] = max(divergence, 0.0)
        if empty:
            status[r] = _EMPTY
        elif bad:
            status[r] = _BAD
        elif vanished:
            status[r] = _VANISHED
    write(logits, batch_rows, chosen, slot, chosen_slots, pool_rows, scratch)
    return out, slot, chosen, statistics, status


_NO_FLOATS = {dimensions: np.empty((0,) * dimensions, np.float32) for dimensions in (1, 2, 3)}
_NO_INTEGERS = {dimensions: np.empty((0,) * dimensions, np.int64) for dimensions in (1, 2)}


@lru_cache(maxsize=16)
def _tables(centres: tuple[int, ...], gamma: float) -> tuple[Any, float]:
    """Bin means [B] float32 and |ln gamma|."""
    if not centres:
        return _NO_FLOATS[1], decay_nats(gamma)
    return LengthBins.cached(centres).table("means", torch.device("cpu")).numpy(), decay_nats(gamma)


def _buffers(into: DrawBuffers | None) -> tuple[Any, ...]:
    """The last arguments of `guide_and_draw`."""
    if into is None:
        return _NO_FLOATS[2], _NO_INTEGERS[1], _NO_INTEGERS[1], _NO_INTEGERS[1], _NO_INTEGERS[2]
    logits = _NO_FLOATS[2] if into.logits is None else into.logits.numpy()
    rows, chosen = (_NO_INTEGERS[1] if t is None else t.numpy() for t in (into.rows, into.chosen))
    return logits, rows, chosen, into.pool_rows.numpy(), into.scratch.numpy()


def tilt_sample(
    candidates: Candidates,
    scores: Scores,
    guidance: GuidanceRows,
    lenvm: LenvmConfig,
    seed: Tensor,
    greedy: Tensor,
    present: Collection[Control] | None,
    statistics: bool = True,
    lengths: bool = True,
    into: DrawBuffers | None = None,
) -> TiltSample:
    """Arguments as in `lenvm_kernels.dispatch.tilt_sample`."""
    # Most of its time this is Python whose code and data have grown cold since the last step, so what is touched
    # counts: no ufuncs of numpy for a few numbers, no views that nobody reads.
    log_q = scores.length_log_q
    means, decay = _tables(tuple(lenvm.bins), lenvm.gamma)
    if log_q is None or not lengths:
        means = _NO_FLOATS[1]
    kernels, by_row = _NO_FLOATS[2], False
    if present is None or Control.POSTERIOR in present:
        log_q, bins = lognormal_log_q(scores.z, lenvm) if log_q is None else (log_q, lenvm.length_bins)
        by_row = any(guidance.tolerance.tolist())
        if by_row:
            at_zero, per_bin = kernel_per_bin(guidance, bins)
            kernels = torch.cat([at_zero[:, None], per_bin], dim=1).numpy()
        else:
            kernels = kernel_table(bins.centres)
    q = log_q.exp().numpy() if log_q is not None and len(kernels) + len(means) else _NO_FLOATS[3]
    logits = None if into is None else into.logits
    kernel_writes = logits is None or (logits.dtype == torch.float32 and logits.is_contiguous())
    g = guidance
    per_candidate = (candidates.log_p, candidates.token_ids, candidates.is_stop, scores.z)
    per_row = (g.mode, g.control, g.target, g.emitted, g.sharpness, g.bias, seed, greedy)
    out, slot, chosen, figures, status = guide_and_draw(
        *(v.numpy() for v in per_candidate),
        q,
        kernels,
        by_row,
        means,
        decay,
        *(v.numpy() for v in per_row),
        statistics,
        *_buffers(into if kernel_writes else None),
    )
    sample = TiltSample(*map(torch.from_numpy, (out, slot, chosen)))
    if lengths:
        sample = sample._replace(length=torch.from_numpy(figures[LENGTH]))
    if statistics:
        value, expected_value, kl = torch.from_numpy(figures[VALUE:]).unbind(0)
        status = torch.from_numpy(status)
        sample = sample._replace(value=value, expected_value=expected_value, kl=kl, status=status)
    if not kernel_writes:
        write_draw(into, sample)
    return sample
