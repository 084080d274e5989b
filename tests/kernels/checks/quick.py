"""Import this before a kernel runs: Triton's interpreter, if it is on, gets quicker than it comes.

It lists the members of its language modules again at every call of a nested kernel function, which takes most of its
time. Within a launch once is enough.
"""

from __future__ import annotations

from typing import Any

from lenvm_kernels import dispatch

if dispatch.INTERPRETED:
    from triton.language import core
    from triton.runtime import interpreter

    _patched: set[int] = set()
    _patch = interpreter._patch_lang

    def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # the launch has patched `triton.language`; `core` stays patched once a nested call has done it
        if any(value is core for value in self.fn.__globals__.values()) and id(core) not in _patched:
            _patch(self.fn)
            _patched.add(id(core))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call
