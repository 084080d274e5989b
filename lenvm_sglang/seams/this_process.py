"""What this process serves, and whether every hook is in its place."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lenvm_sglang.metrics import RequestMetrics
from lenvm_sglang.scope import ThinkTags
from lenvm_sglang.settings import Settings

if TYPE_CHECKING:
    from lenvm_sglang.rows import LengthRows

Hook = tuple[str, str, Callable[..., Any]]
"""(target, kind, hook)."""


class SeamError(RuntimeError):
    """The host is not one this plug-in knows; the message says which it is."""


@dataclass
class Process:
    """What this process serves; one object for each launcher or scheduler process.

    Attributes:
        settings: of the server; None without a LenVM.
        command_line: the launcher came from the command line, where a refusal is one sentence and an exit status.
        worker: the value worker of a scheduler process.
        step: the sampling step under way in a scheduler process.
        decoded: the host's requests in its last decode step and their rows with length fields, which are the same in
            the next one if the requests are.
        metrics: of the front end's process, with `--enable-metrics`.
        longest: in a front end's process, most tokens of prompt and completion together.
        sees_images: in a front end's process, the value model reads the images of a prompt.
        think_tags: of the base model, where a reasoning parser names them.
        hooks: those installed in this process; None before that.
    """

    settings: Settings | None = None
    command_line: bool = False
    worker: Any = None
    step: Any = None
    decoded: tuple[list[Any], LengthRows | None] | None = None
    metrics: RequestMetrics | None = None
    longest: int = 0
    sees_images: bool = False
    think_tags: ThinkTags | None = None
    hooks: tuple[Hook, ...] | None = None

    @property
    def served(self) -> bool:
        return self.settings is not None


process = Process()


def verify() -> None:
    """Check that every hook of this process is in place.

    Raises:
        SeamError: naming the ones that are not.
    """
    if process.hooks is None:
        raise SeamError("the plug-in was never installed in this process.")
    missing = [target for target, _, hook in process.hooks if not _wraps(pkgutil.resolve_name(target), hook)]
    if missing:
        raise SeamError(f"these hooks did not take, so the server would ignore length fields: {', '.join(missing)}.")


def _wraps(function: Any, hook: Callable[..., Any]) -> bool:
    """Whether `hook` is in a function's chain of wrappers (each keeps its hook in its closure)."""
    function = getattr(function, "__func__", function)
    while function is not None:
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        if hook in [c for c in cells if callable(c)]:
            return True
        function = getattr(function, "__wrapped__", None)
    return False
