"""`build_candidates`: strict bounds, torch's softmax, then the most probable tokens and the host's filters on them."""

from __future__ import annotations

from math import log

import numpy as np
import torch
from torch import Tensor

from lenvm.candidates import Candidates, SamplingRows, most_likely
from lenvm.guidance import GuidanceRows, strict_bounds
from lenvm_kernels.compiled.common import NEG_INF, compiled

MAX_SELECTED = 64
"""Most tokens of a row that `select` keeps in order while it reads; for more the core's `most_likely` is faster."""


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
        for v in range(columns):
            if row[v] > least:
                n = count - 1
                while n > 0 and best[n - 1] < row[v]:
                    best[n], best_id[n] = best[n - 1], best_id[n - 1]
                    n -= 1
                best[n], best_id[n] = row[v], v
                least = best[count - 1]
    return ids


@compiled("Tuple((i8[:,::1], f4[:,::1], b1[:,::1]))(f4[:,::1], i8[:,:], i8[:], f4[:], f4[:], i8[:,:], i8, b1)")
def cut(probabilities, order, top_k, top_p, min_p, stops, width, filtered):
    """Each row: probabilities [V] and ids [N] of its most probable tokens, the larger first; filtered, cut to `width`
    and normalised."""
    rows, count = order.shape
    vocabulary = probabilities.shape[1]
    token_ids = np.zeros((rows, width), np.int64)
    log_p = np.full((rows, width), np.float32(NEG_INF))
    is_stop = np.zeros((rows, width), np.bool_)
    p = np.empty(count)
    for r in range(rows):
        for n in range(count):
            p[n] = probabilities[r, order[r, n]] if order[r, n] >= 0 else 0.0
        within, total = count, 1.0
        if filtered and top_k[r] < vocabulary:
            within, total = min(count, top_k[r]), 0.0
            for n in range(within):
                total += p[n]
        before, mass = 0.0, 0.0
        for n in range(width):
            token_ids[r, n] = max(order[r, n], 0)  # an empty slot still names a token that exists
            for s in range(stops.shape[1]):
                is_stop[r, n] |= token_ids[r, n] == stops[r, s]
            keep = p[n] > 0.0  # NaN is not: a row with a NaN logit is empty
            if filtered:
                keep &= n < within and before <= top_p[r] * total and p[n] >= min_p[r] * p[0]
            before += p[n]
            if keep:
                mass += p[n]
                log_p[r, n] = log(p[n])
        for n in range(width if mass > 0.0 else 0):
            log_p[r, n] -= log(mass)
    return token_ids, log_p, is_stop


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
    logits = logits.float().contiguous()
    stops = stop_token_ids.numpy()
    if guidance is not None:
        logits = logits.clone() if logits is given else logits
        bound(logits.numpy(), stops, *(rows.numpy() for rows in strict_bounds(guidance)))
    probabilities = torch.softmax(logits if sampling.no_temperature else logits / sampling.temperature[:, None], dim=-1)
    count = min(max(reach, width), vocabulary)
    order = select(logits.numpy(), count) if count <= MAX_SELECTED else most_likely(logits, count).numpy()
    filters = (sampling.top_k.numpy(), sampling.top_p.numpy(), sampling.min_p.numpy())
    found = cut(probabilities.numpy(), order, *filters, stops, width, not sampling.unfiltered)
    return Candidates(*map(torch.from_numpy, found))
