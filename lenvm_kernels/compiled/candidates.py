"""`build_candidates`: torch's softmax, then the most probable tokens and the host's sampling filters on them."""

from __future__ import annotations

from math import log

import numpy as np
import torch
from torch import Tensor

from lenvm.candidates import Candidates, SamplingRows
from lenvm_kernels.compiled.common import NEG_INF, compiled

MAX_SELECTED = 64
"""Most tokens of a row that `select` keeps in order while it reads; torch's top-k takes more."""


@compiled("Tuple((f4[:,::1], i8[:,::1]))(f4[:,::1], i8)")
def select(probabilities, count):
    """The `count` largest of each row and their columns, [R, count] each; among equals the lower column."""
    rows, columns = probabilities.shape
    top, top_id = np.empty((rows, count), np.float32), np.zeros((rows, count), np.int64)
    for r in range(rows):
        row, best, best_id = probabilities[r], top[r], top_id[r]
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
    return top, top_id


@compiled("Tuple((i8[:,::1], f4[:,::1], b1[:,::1]))(f4[:,:], i8[:,:], i8[:], f4[:], f4[:], i8[:,:], i8, i8, b1)")
def cut(top, top_id, top_k, top_p, min_p, stops, vocabulary, width, filtered):
    """Each row: the probabilities and ids [R, N] of its most probable tokens, the larger first, in any order among
    equals; filtered, cut to `width` and normalised."""
    rows, count = top.shape
    token_ids = np.zeros((rows, width), np.int64)
    log_p = np.full((rows, width), np.float32(NEG_INF))
    is_stop = np.zeros((rows, width), np.bool_)
    p, token = np.empty(count), np.empty(count, np.int64)
    for r in range(rows):
        for n in range(count):
            i = n  # equal ones by token id, the lower first
            while i > 0 and p[i - 1] == top[r, n] and token[i - 1] > top_id[r, n]:
                p[i], token[i] = p[i - 1], token[i - 1]
                i -= 1
            p[i], token[i] = top[r, n], top_id[r, n]
        within, total = count, 1.0
        if filtered and top_k[r] < vocabulary:
            within, total = min(count, top_k[r]), 0.0
            for n in range(within):
                total += p[n]
        before, mass = 0.0, 0.0
        for n in range(width):
            token_ids[r, n] = token[n]
            for s in range(stops.shape[1]):
                is_stop[r, n] |= token[n] == stops[r, s]
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
    logits: Tensor, sampling: SamplingRows, stop_token_ids: Tensor, max_candidates: int, reach: int
) -> Candidates:
    """Arguments as in `lenvm_kernels.dispatch.build_candidates`, without strict bounds."""
    vocabulary = logits.shape[1]
    width = min(max_candidates, vocabulary)
    scaled = logits.float() if sampling.no_temperature else logits.float() / sampling.temperature[:, None]
    probabilities, count = torch.softmax(scaled, dim=-1), min(max(reach, width), vocabulary)
    if count <= MAX_SELECTED:
        top, top_id = select(probabilities.numpy(), count)
    else:
        top, top_id = (t.numpy() for t in torch.topk(probabilities, count, dim=-1))
    arrays = (sampling.top_k, sampling.top_p, sampling.min_p, stop_token_ids)
    found = cut(top, top_id, *(a.numpy() for a in arrays), vocabulary, width, not sampling.unfiltered)
    return Candidates(*map(torch.from_numpy, found))
