"""A plug-in of the tests' own, loaded before ours: it takes away a function that ours hooks, as a new version of the
host might."""

from __future__ import annotations


def register() -> None:
    """Take it away."""
    from sglang.srt.managers.scheduler import Scheduler

    del Scheduler.init_memory_pools
