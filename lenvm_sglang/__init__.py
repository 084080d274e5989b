"""SGLang plug-in: a length value model beside an untouched base model.

`register` is the entry point of the group `sglang.srt.plugins`. It hooks the host through SGLang's own HookRegistry
and changes nothing until a server is started with `--lenvm-model`; a request that carries a length field without it
gets HTTP 400. Set `LENVM_SGLANG_DISABLE=1` to leave the host alone altogether.
"""

from __future__ import annotations

import os

OFF_SWITCH = "LENVM_SGLANG_DISABLE"
"""Environment variable: any value but empty or 0 keeps the plug-in out of the host."""


def register() -> None:
    """Install the plug-in's hooks. Called by SGLang in the launcher, the scheduler and the detokenizer.

    Raises:
        SeamError: the host is not a version this plug-in knows, or a function it hooks is missing.
    """
    if os.environ.get(OFF_SWITCH, "") not in ("", "0"):
        return
    from lenvm_sglang.seams import install

    install()
