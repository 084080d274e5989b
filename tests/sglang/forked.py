"""A plug-in of the tests' own: the launcher forks its scheduler and its detokenizer.

SGLang spawns them, and each imports the host once more, which is most of the start of a server of tiny models. The
servers that stand for what users start are spawned: both launchers, and those of `tests/e2e`.
"""

from __future__ import annotations

import multiprocessing
from typing import Any


def register() -> None:
    """Change the start method after the host has chosen one."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", fork, HookType.AFTER)


def fork(result: Any, server_args: Any) -> None:
    """AFTER _set_envs_and_config."""
    multiprocessing.set_start_method("fork", force=True)
