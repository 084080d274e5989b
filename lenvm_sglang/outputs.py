"""Bringing predicted lengths from the device to the response, through SGLang's auxiliary outputs.

Device tensors travel with the sampled tokens (one copy, no extra wait), are committed to the request objects when the
host commits the tokens, and leave the scheduler as customised response metadata of the requests they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lenvm_sglang.state import RequestState

REPORT_KEY = "lenvm"
"""Key of our entry in the host's customised metadata."""
QUANTILES = (0.1, 0.5, 0.9)
"""Quantiles of the completion length reported at the prompt boundary."""
SEQUENCE_COLUMNS = ("value", "remaining", *(f"p{round(100 * p)}" for p in QUANTILES))
"""Of one state of a sequence: V in (-1, 0], then the remaining length and its quantiles in tokens."""


@dataclass(frozen=True)
class LengthOutput:
    """Predicted lengths of some rows of one step, on the device; becomes `HostLengthOutput` on the host.

    Attributes:
        index: positions of the rows in the batch.
        states: their request objects.
        lengths: float32 tokens. After a token: [len(index)] predicted remaining length. At the prompt boundary:
            [len(index), 4] predicted completion length, then its quantiles (`QUANTILES`).
        at_prompt: which of the two.
    """

    index: list[int]
    states: list[RequestState]
    lengths: Tensor
    at_prompt: bool

    def copy_to_host(self, copy_tensor: Callable[[Tensor], Tensor]) -> HostLengthOutput:
        """Called by the host when it copies the sampled tokens."""
        return HostLengthOutput(self.index, self.states, copy_tensor(self.lengths), self.at_prompt)


@dataclass(frozen=True)
class HostLengthOutput:
    """`LengthOutput` after the copy."""

    index: list[int]
    states: list[RequestState]
    lengths: Tensor
    at_prompt: bool

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Commit to the requests; called by the host after it committed the tokens, before it streams them.

        Args:
            batch: the host's batch; not needed, the rows' request objects are known.
            commits: for each row of the batch, the tokens committed, or None.
        """
        for row, state, length in zip(self.index, self.states, self.lengths.tolist(), strict=True):
            if self.at_prompt:
                if state.predicted_length is None:
                    state.predicted_length, *state.quantiles = map(_finite, length)
            elif commits[row] is not None:
                state.values.append(_finite(length))


@dataclass(frozen=True)
class SequenceOutput:
    """Every state of a piece of a sequence, on the device and after the copy alike.

    Attributes:
        state: the request.
        start: how many of its states came before.
        after_stop: [n] bool on the host, the states that follow a stop token: nothing remains there, by definition.
        columns: [n, len(SEQUENCE_COLUMNS)] float32.
    """

    state: RequestState
    start: int
    after_stop: list[bool]
    columns: Tensor

    def copy_to_host(self, copy_tensor: Callable[[Tensor], Tensor]) -> SequenceOutput:
        """Called by the host when it copies the sampled tokens."""
        return SequenceOutput(self.state, self.start, self.after_stop, copy_tensor(self.columns))

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Called by the host after each chunk of the sequence; a sequence read again replaces what it had."""
        kept = self.state.sequence
        assert self.start <= len(kept), f"states {len(kept)} to {self.start} of a sequence were never read"
        nothing: list[float | None] = [0.0] * len(SEQUENCE_COLUMNS)
        found = [list(map(_finite, row)) for row in self.columns.tolist()]
        rows = zip(found, self.after_stop, strict=True)
        kept[self.start :] = [nothing if ended else row for row, ended in rows]


def _finite(number: float) -> float | None:
    """JSON has no NaN: what a broken value model says is null."""
    return number if math.isfinite(number) else None


def reporting_streamer(base: type, state_of: Callable[[Any], RequestState | None]) -> type:
    """The host's output streamer with one more entry of metadata, for requests with length fields only.

    Args:
        base: the host's SchedulerOutputStreamer.
        state_of: from a host request to its state.
    """

    class LengthReportingStreamer(base):  # type: ignore[misc, valid-type]
        has_additional_customized_info = True

        def should_build_additional_customized_info(self) -> bool:
            return True

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
            states = [state_of(req) for req in reqs]
            if not any(states):
                return {}
            return {REPORT_KEY: [None if state is None else [state.take_report()] for state in states]}

    return LengthReportingStreamer
