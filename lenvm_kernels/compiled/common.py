"""Pieces shared by the compiled kernels."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from numba import config, njit

from lenvm import candidates, guidance, sampler
from lenvm_kernels import results

NEG_INF = -np.inf

_WORD = (1 << 64) - 1
_INCREMENT = np.uint64(sampler._INCREMENT & _WORD)
_MIX_A = np.uint64(sampler._MIX_A & _WORD)
_MIX_B = np.uint64(sampler._MIX_B & _WORD)
_11, _27, _30, _31 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31)

Function = Callable[..., Any]


def _folder() -> str:
    """Where machine code is kept: a folder for these very sources. By itself numba looks at the age of a function's own
    file, and would go on with code that holds another file's constants and functions as they were."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(here.glob("*.py")):
        digest.update(path.read_bytes())
    for module in (candidates, guidance, sampler, results):
        digest.update(inspect.getsource(module).encode())
    return str(Path(config.CACHE_DIR or here / "__pycache__") / f"numba-{digest.hexdigest()[:16]}")


FOLDER = _folder()


def compiled(*signature: str, fastmath: Collection[str] = ()) -> Callable[[Function], Function]:
    """`numba.njit` with the machine code kept on disk, and the numbers of numpy: a division by zero is no exception.

    With signatures it is compiled (or read from the disk) right here, and not at the first call. `fastmath` names what
    the compiler may do to floats, by LLVM's flags."""

    def decorate(function: Function) -> Function:
        signatures = [list(signature)] if signature else []
        options = {"error_model": "numpy", "fastmath": set(fastmath)}
        given, config.CACHE_DIR = config.CACHE_DIR, FOLDER
        try:
            return njit(*signatures, cache=True, **options)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # nowhere to keep it: neither the package's folder nor a user's is writable
            return njit(*signatures, **options)(function)  # type: ignore[no-any-return]
        finally:
            config.CACHE_DIR = given

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
