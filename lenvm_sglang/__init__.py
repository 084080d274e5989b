"""SGLang plug-in: a length value model beside an untouched base model.

`register` is the entry point of the group `sglang.srt.plugins`. It hooks the host through SGLang's own HookRegistry
and changes nothing until a server is started with `--lenvm-model`; a request that carries a length field without it
gets HTTP 400. Set `LENVM_SGLANG_DISABLE=1` to leave the host alone altogether.
"""

from __future__ import annotations

import os
import sys

OFF_SWITCH = "LENVM_SGLANG_DISABLE"
"""Environment variable: any value but empty or 0 keeps the plug-in out of the host."""


def register() -> None:
    """Install the plug-in's hooks. Called by SGLang in the launcher, the scheduler and the detokenizer.

    Raises:
        SeamError: the host is not a version this plug-in knows, or a function it hooks is missing. SGLang logs it and
            starts without length control.
        SystemExit: the same, where the command line asks for a length value model.
    """
    if os.environ.get(OFF_SWITCH, "") not in ("", "0"):
        return
    from lenvm_sglang.seams import SeamError, install

    try:
        install()
    except SeamError as error:
        if any(argument.startswith("--lenvm-model") for argument in sys.argv):
            raise SystemExit(f"lenvm: {error}") from None
        raise
