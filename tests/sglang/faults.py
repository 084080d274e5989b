"""A plug-in of its own that breaks the value model, for tests: SGLang loads it in every process beside ours.

What breaks is said by tokens: where one of them is in the input of a value forward, that forward raises, or its hidden
states become NaN or infinite.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

RAISE_IN_PREFILL, NAN, INFINITE, RAISE_IN_DECODE = 300, 301, 302, 303
"""Tokens. RAISE_IN_DECODE is looked for among candidates only."""


def install_into(directory: Path) -> Path:
    """Write the metadata of a distribution whose entry point is `register`; the folder belongs on PYTHONPATH."""
    info = directory / "lenvm_faults-0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lenvm-faults\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nlenvm_faults = tests.sglang.faults:register\n")
    return directory


def register() -> None:
    """Wrap the value worker's forward."""
    from lenvm_sglang.worker import ValueWorker

    original = ValueWorker._forward

    def forward(self: ValueWorker, batch: Any, backend: Any) -> Any:
        prefill = batch.forward_mode.is_extend()
        wanted = RAISE_IN_PREFILL if prefill else RAISE_IN_DECODE
        if bool((batch.input_ids == wanted).any()):
            raise RuntimeError("out of memory, or so")
        hidden = original(self, batch, backend)
        for token, value in ((NAN, float("nan")), (INFINITE, float("inf"))):
            hidden[batch.input_ids == token] = value
        return hidden

    ValueWorker._forward = forward  # type: ignore[method-assign]
