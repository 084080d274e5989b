"""Pieces shared by the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import numpy as np
from numba import njit

from lenvm import sampler

NEG_INF = -np.inf
NO_TOKEN = 2**31 - 1
"""Stands for "no token id"; above every vocabulary."""

_WORD = (1 << 64) - 1
_INCREMENT = np.uint64(sampler._INCREMENT & _WORD)
_MIX_A = np.uint64(sampler._MIX_A & _WORD)
_MIX_B = np.uint64(sampler._MIX_B & _WORD)
_11, _27, _30, _31 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31)

Function = Callable[..., Any]


def compiled(*signature: str) -> Callable[[Function], Function]:
    """`numba.njit` with the machine code kept on disk, and the numbers of numpy: a division by zero is no exception.

    With a signature it is compiled (or read from the disk) right here, and not at the first call."""

    def decorate(function: Function) -> Function:
        try:
            return njit(*signature, cache=True, error_model="numpy")(function)  # type: ignore[no-any-return]
        except RuntimeError:  # nowhere to keep it: neither the package's folder nor a user's is writable
            return njit(*signature, error_model="numpy")(function)  # type: ignore[no-any-return]

    return decorate


@compiled()
def splitmix(x):
    """SplitMix64's finaliser on uint64, as in `lenvm.sampler`."""
    x = x + _INCREMENT
    x = (x ^ (x >> _30)) * _MIX_A
    x = (x ^ (x >> _27)) * _MIX_B
    return x ^ (x >> _31)


@compiled()
def position_key(seed, position):
    """What a seed and a position give to the key of every candidate."""
    return splitmix(splitmix(np.uint64(seed)) ^ np.uint64(position))


@compiled()
def keyed_gumbel(key, token):
    """Standard Gumbel noise of a candidate, float64, the same as `lenvm.sampler.keyed_gumbel`."""
    uniform = (float(splitmix(key ^ np.uint64(token)) >> _11) + 0.5) * 2.0**-53
    return -log(-log(uniform))
