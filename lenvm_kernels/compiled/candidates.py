"""`build_candidates`: strict bounds, the most probable tokens, and the host's filters on them."""

from __future__ import annotations

from math import exp, log

import numpy as np
import torch
from torch import Tensor

from lenvm.candidates import LARGEST_LOGIT, Candidates, SamplingRows, most_likely, possible
from lenvm.guidance import GuidanceRows, strict_bounds
from lenvm_kernels.compiled.common import NEG_INF, compiled

MAX_SELECTED = 64
"""Most tokens of a row that `select` keeps in order while it reads; for more the core's `most_likely` is faster."""
_BLOCK = 64
"""Logits that `select` looks through at once for one that is large enough."""
_LARGEST = np.float32(LARGEST_LOGIT)


@compiled("void(f4[:,::1], i8[:,:], b1[:], b1[:])")
def bound(logits, stops, ban, force):
    """Strict bounds on logits [R, V], in place: stop tokens taken out, or all others, unless nothing would be left."""
    rows, columns = logits.shape
    for r in range(rows):
        if not (ban[r] or force[r]):
            continue
        row, ended = logits[r], np.full(stops.shape[1], np.float32(NEG_INF))
        for s in range(len(ended)):
            if 0 <= stops[r, s] < columns:
                ended[s] = row[stops[r, s]]
                row[stops[r, s]] = NEG_INF
        possible = False
        if force[r]:
            for s in range(len(ended)):
                possible |= ended[s] > NEG_INF
            if possible:
                row[:] = NEG_INF
        else:
            for v in range(columns):
                possible |= row[v] > NEG_INF
        if force[r] or not possible:
            for s in range(len(ended) - 1, -1, -1):  # one named twice: what it was the first time
                if 0 <= stops[r, s] < columns:
                    row[stops[r, s]] = ended[s]


@compiled("i8[:,::1](f4[:,::1], i8)")
def select(logits, count):
    """Ids [R, count] of the largest of each row, as `lenvm.candidates.most_likely` orders them; -1 where no more tokens
    are possible."""
    rows, columns = logits.shape
    ids, best = np.full((rows, count), -1, np.int64), np.empty(count, np.float32)
    for r in range(rows):
        row, best_id = logits[r], ids[r]
        best[:] = NEG_INF
        least = best[count - 1]
        for start in range(0, columns, _BLOCK):
            block = row[start : start + _BLOCK]
            if len(block) == _BLOCK:
                above = np.int32(0)
                for v in range(_BLOCK):  # a loop that the compiler turns into a few instructions
                    above += np.int32(block[v] > least)
                if above == 0:
                    continue
            for v in range(len(block)):
                if block[v] > least:  # NaN is not
                    n = count - 1
                    while n > 0 and best[n - 1] < block[v]:
                        best[n], best_id[n] = best[n - 1], best_id[n - 1]
                        n -= 1
                    best[n], best_id[n] = block[v], start + v
                    least = best[count - 1]
    return ids


@compiled(
    "Tuple((i8[:,::1], f4[:,::1], b1[:,::1]))(f4[:,::1], i8[:,:], f4[:,:], f4[:], i8[:], f4[:], f4[:], i8[:,:], i8, b1)"
)
def cut(logits, order, probabilities, temperature, top_k, top_p, min_p, stops, width, filtered):
    """Each row: ids [N] of its largest logits [V], the larger first; filtered, cut to `width` and normalised.
    `probabilities` [V] may be empty, if no row has a top-p over the whole vocabulary."""
    rows, count = order.shape
    vocabulary = logits.shape[1]
    token_ids = np.zeros((rows, width), np.int64)
    log_p = np.full((rows, width), np.float32(NEG_INF))
    is_stop = np.zeros((rows, width), np.bool_)
    x, weight = np.empty(count), np.empty(count, np.float32)  # of each, relative to the most probable
    for r in range(rows):
        for n in range(count):
            token = order[r, n]
            logit = min(logits[r, token], _LARGEST) if token >= 0 else np.float32(NEG_INF)
            x[n] = logit / temperature[r] if logit > NEG_INF else NEG_INF  # NaN is not
        top = x[0] if x[0] > NEG_INF else 0.0
        within, total = count, np.inf
        for n in range(count):
            x[n] -= top
            weight[n] = exp(x[n])
        if filtered:
            if top_k[r] < vocabulary:
                within = min(count, top_k[r])
            if top_p[r] < 1.0 and top_k[r] < vocabulary:
                total = 0.0
                for n in range(within):
                    total += weight[n]
            elif top_p[r] < 1.0:
                total = 1.0 / probabilities[r, max(order[r, 0], 0)]
        before, mass = 0.0, 0.0
        for n in range(width):
            token_ids[r, n] = max(order[r, n], 0)  # an empty slot still names a token that exists
            for s in range(stops.shape[1]):
                is_stop[r, n] |= token_ids[r, n] == stops[r, s]
            keep = weight[n] > 0.0
            if filtered:
                keep &= n < within and before <= top_p[r] * total and weight[n] >= min_p[r]
            before += weight[n]
            if keep:
                mass += weight[n]
                log_p[r, n] = x[n]
        for n in range(width if mass > 0.0 else 0):
            log_p[r, n] -= log(mass)
    return token_ids, log_p, is_stop


@compiled("UniTuple(i8, 2)(f4[:,:])")
def extent(log_p):
    """How many of the first slots [R, K] hold every candidate, and how many candidates there are."""
    used, kept = 0, 0
    for r in range(log_p.shape[0]):
        for n in range(log_p.shape[1]):
            if log_p[r, n] > NEG_INF:
                used, kept = max(used, n + 1), kept + 1
    return used, kept


_NO_PROBABILITIES = np.empty((0, 0), np.float32)


def build_candidates(
    logits: Tensor,
    sampling: SamplingRows,
    stop_token_ids: Tensor,
    max_candidates: int,
    guidance: GuidanceRows | None,
    reach: int,
) -> Candidates:
    """Arguments as in `lenvm_kernels.dispatch.build_candidates`."""
    vocabulary, given = logits.shape[1], logits
    width = min(max_candidates, vocabulary)
    logits, stops = logits.float().contiguous(), stop_token_ids.numpy()
    if guidance is not None:
        logits = logits.clone() if logits is given else logits
        bound(logits.numpy(), stops, *(rows.numpy() for rows in strict_bounds(guidance)))
    count = min(max(reach, width), vocabulary)
    order = select(logits.numpy(), count) if count <= MAX_SELECTED else most_likely(possible(logits), count).numpy()
    s, probabilities = sampling, _NO_PROBABILITIES
    temperature, top_k, top_p, min_p = (t.numpy() for t in (s.temperature, s.top_k, s.top_p, s.min_p))
    if not (s.unfiltered or s.no_whole_top_p) and ((top_k >= vocabulary) & (top_p < 1)).any():
        probabilities = torch.softmax(possible(logits) / s.temperature[:, None], dim=-1).numpy()
    filters = (probabilities, temperature, top_k, top_p, min_p)
    found = cut(logits.numpy(), order, *filters, stops, width, not s.unfiltered)
    return Candidates(*map(torch.from_numpy, found))
