"""Imported at the start of a process with TRITON_INTERPRET=1: what Triton's interpreter lacks for Liger's kernels.

It hands float arguments on as Python floats, which the kernels convert like Triton scalars, and it cannot call the
device library's `rsqrt`.
"""

from __future__ import annotations

from typing import Any

import liger_kernel.ops.rms_norm
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._implicit_cvt


def _with_floats(value: Any) -> Any:
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    return _convert(value)


@triton.jit
def _rsqrt(x):  # type: ignore[no-untyped-def]
    return tl.math.rsqrt(x)


interpreter._implicit_cvt = _with_floats
liger_kernel.ops.rms_norm.rsqrt = _rsqrt
