"""`build_candidates`: the host's sampling filters on the most probable tokens, given by torch's top-k.

Order does not depend on the temperature, so the top-k runs on the logits as they are. top-p without a top-k is relative
to the whole vocabulary, whose mass torch sums.
"""

from __future__ import annotations

from math import exp, log

import numpy as np
import torch
from torch import Tensor

from lenvm.candidates import Candidates, SamplingRows
from lenvm_kernels.compiled.common import NEG_INF, compiled

_LARGEST = float(np.finfo(np.float32).max)


@compiled(
    "Tuple((i8[:,::1], f4[:,::1], b1[:,::1]))(f4[:,:], i8[:,:], f4[:], f4[:], i8[:], f4[:], f4[:], i8[:,:], i8, i8, b1)"
)
def cut(top, top_id, log_mass, temperature, top_k, top_p, min_p, stops, vocabulary, width, filtered):
    """Each row: its most probable tokens [R, N], in any order among equals, filtered, cut to `width` and normalised."""
    rows, count = top.shape
    token_ids = np.zeros((rows, width), np.int64)
    log_p = np.full((rows, width), np.float32(NEG_INF))
    is_stop = np.zeros((rows, width), np.bool_)
    value, token = np.empty(count), np.empty(count, np.int64)
    for r in range(rows):
        for n in range(count):
            # NaN is impossible, +inf the largest number
            x = top[r, n]
            x = NEG_INF if np.isnan(x) else min(float(x), _LARGEST)
            i = n  # they come almost sorted: equal values by token id, the lower first
            while i > 0 and (value[i - 1] < x or (value[i - 1] == x and token[i - 1] > top_id[r, n])):
                value[i], token[i] = value[i - 1], token[i - 1]
                i -= 1
            value[i], token[i] = x, top_id[r, n]
        highest = value[0] / temperature[r]
        within = count
        if filtered and top_k[r] < vocabulary:
            within = min(count, max(top_k[r], 0))
        total = 0.0
        if filtered:
            if top_k[r] >= vocabulary:
                # a NaN logit spoils the sum: top-p takes nothing away then
                total = exp(log_mass[r] - highest) if log_mass[r] < np.inf else np.inf
            else:
                for n in range(within):
                    total += exp(value[n] / temperature[r] - highest)
        before, kept_mass = 0.0, 0.0
        for n in range(min(width, count)):
            token_ids[r, n] = token[n]
            for s in range(stops.shape[1]):
                is_stop[r, n] |= token[n] == stops[r, s]
            weight = exp(value[n] / temperature[r] - highest) if value[n] > NEG_INF else 0.0
            keep = weight > 0.0
            if filtered and n > 0:
                keep &= n < within and before <= top_p[r] * total and weight >= min_p[r]
            before += weight
            if keep:
                kept_mass += weight
                log_p[r, n] = value[n] / temperature[r] - highest
        shift = log(kept_mass)
        for n in range(min(width, count)):
            log_p[r, n] -= shift
    return token_ids, log_p, is_stop


def build_candidates(
    logits: Tensor, sampling: SamplingRows, stop_token_ids: Tensor, max_candidates: int, reach: int
) -> Candidates:
    """Arguments as in `lenvm_kernels.dispatch.build_candidates`, without strict bounds."""
    vocabulary = logits.shape[1]
    width = min(max_candidates, vocabulary)
    logits = logits.float()
    top, top_id = torch.topk(logits, min(max(reach, width), vocabulary), dim=-1)
    temperature = sampling.temperature
    log_mass = temperature  # not read
    if not sampling.unfiltered:
        log_mass = (logits if sampling.no_temperature else logits / temperature[:, None]).logsumexp(-1)
    arrays = (top, top_id, log_mass, temperature, sampling.top_k, sampling.top_p, sampling.min_p, stop_token_ids)
    found = cut(*(a.numpy() for a in arrays), vocabulary, width, not sampling.unfiltered)
    return Candidates(*map(torch.from_numpy, found))
