"""A plug-in of the tests' own that breaks the value model.

What breaks is said by tokens: where one of them is in the input of a value forward, that forward raises, or its hidden
states become NaN or infinite.
"""

from __future__ import annotations

from typing import Any

RAISE_IN_PREFILL, NAN, INFINITE, RAISE_IN_DECODE = 300, 301, 302, 303
"""Tokens. RAISE_IN_DECODE is looked for among candidates only."""


def register() -> None:
    """Wrap the value worker's forward."""
    from lenvm_sglang.worker import ValueWorker

    original = ValueWorker.forward

    def forward(self: ValueWorker, batch: Any, backend: Any) -> Any:
        prefill = batch.forward_mode.is_extend()
        wanted = RAISE_IN_PREFILL if prefill else RAISE_IN_DECODE
        if bool((batch.input_ids == wanted).any()):
            raise RuntimeError("out of memory, or so")
        hidden = original(self, batch, backend)
        for token, value in ((NAN, float("nan")), (INFINITE, float("inf"))):
            hidden[batch.input_ids == token] = value
        return hidden

    ValueWorker.forward = forward  # type: ignore[method-assign]
