"""The guidance step in a handful of launches: Triton kernels for what surrounds the value model's forward.

Six functions, each with plain torch as its reference: `place_candidates` (where candidates will stand, and the KV of
the last choice), `build_candidates` (cut the candidate sets), `attend_prefix` (attention of candidates that share a
prefix), `value_head` (hidden states to z), `lookahead_scores` (hidden states to the scores of candidates that nobody
read) and `tilt_sample` (guide, draw, write, report). For a CPU numba compiles `build_candidates`, `tilt_sample` and
what stands in for `place_candidates` there: `keep_chosen`, `share_prefix`, `extent`. `lenvm_kernels.dispatch` picks the
kernel or the reference. Imports without Triton and numba; knows no host.
"""

from __future__ import annotations

from lenvm_kernels.buffers import (
    CandidateRows,
    DrawBuffers,
    Keep,
    PrefixMasks,
    PrefixRows,
    RequestTables,
    SharedRows,
    SlotBuffers,
)
from lenvm_kernels.dispatch import (
    attend_prefix,
    build_candidates,
    extent,
    keep_chosen,
    lookahead_scores,
    place_candidates,
    prepare,
    share_prefix,
    tilt_sample,
    uses_numba,
    uses_triton,
    value_head,
)
from lenvm_kernels.results import WORDS, Status, TiltSample

__all__ = [
    "WORDS",
    "CandidateRows",
    "DrawBuffers",
    "Keep",
    "PrefixMasks",
    "PrefixRows",
    "RequestTables",
    "SharedRows",
    "SlotBuffers",
    "Status",
    "TiltSample",
    "attend_prefix",
    "build_candidates",
    "extent",
    "keep_chosen",
    "lookahead_scores",
    "place_candidates",
    "prepare",
    "share_prefix",
    "tilt_sample",
    "uses_numba",
    "uses_triton",
    "value_head",
]
