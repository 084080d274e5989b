"""The guidance step in a handful of launches: Triton kernels for what surrounds the value model's forward.

Four functions, each with the core's plain torch as its reference: `build_candidates` (cut the candidate sets),
`value_head` (hidden states to z), `lookahead_scores` (hidden states to the scores of candidates that nobody read) and
`tilt_sample` (guide, draw, report). On a CPU the first and the last are compiled by numba. `lenvm_kernels.dispatch`
picks the kernel or the reference. Imports without Triton and numba; knows no host.
"""

from __future__ import annotations

from lenvm_kernels.dispatch import (
    build_candidates,
    lookahead_scores,
    prepare,
    tilt_sample,
    uses_numba,
    uses_triton,
    value_head,
)
from lenvm_kernels.results import Status, TiltSample

__all__ = [
    "Status",
    "TiltSample",
    "build_candidates",
    "lookahead_scores",
    "prepare",
    "tilt_sample",
    "uses_numba",
    "uses_triton",
    "value_head",
]
