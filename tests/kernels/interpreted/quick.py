"""Import this before a kernel runs: the interpreter is on, and quicker than it comes.

Triton's interpreter lists the members of its language modules again at every call of a nested kernel function, which
takes most of its time. Within a launch once is enough.
"""

from __future__ import annotations

import os
from typing import Any

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/kernels/test_interpreted.py, or with the variable"

from triton.language import core  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_patched: set[int] = set()
_patch = interpreter._patch_lang


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    # the launch has patched `triton.language`; `core` stays patched once a nested call has done it
    if any(value is core for value in self.fn.__globals__.values()) and id(core) not in _patched:
        _patch(self.fn)
        _patched.add(id(core))
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call
