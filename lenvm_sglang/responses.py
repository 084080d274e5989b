"""The `lenvm` object of responses: from the host's metadata to the client.

The host's front end hands outputs through one async generator (`TokenizerManager.generate_request`), inside the task
of the HTTP request. There the object is built; the ASGI middleware, which started the task, finds it in a context
variable and writes it into OpenAI-shaped bodies, whose own schemas drop unknown fields.

Streams with `return_length_values` also get a `lenvm_delta` in every chunk that brings new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from lenvm.request import LengthRequest
from lenvm_sglang.outputs import QUANTILES, REPORT_KEY
from lenvm_sglang.scope import counted

Report = dict[str, Any]
"""`{"predicted_length", "target", "mode", "achieved"}`; with a `length_scope` also "scope"; with
`return_length_values` also "values" and "quantiles"."""
DELTA_KEY = "lenvm_delta"
"""Entry of streamed outputs: `{"predicted_length", "values"}`, the values those of the tokens that are new."""


@dataclass
class Collected:
    """What the outputs of one HTTP request said.

    Attributes:
        reports: of finished choices, by index.
        deltas: not yet sent, by index of the choice.
    """

    reports: dict[int, Report] = field(default_factory=dict)
    deltas: dict[int, Report] = field(default_factory=dict)


collected: ContextVar[Collected | None] = ContextVar("lenvm_collected", default=None)
"""Of the current HTTP request; None outside a request with length fields."""


@dataclass
class Progress:
    """What the front end has heard of one running request.

    Attributes:
        request: its length fields.
        stream: it is answered piece by piece.
        predicted_length, quantiles: at the prompt boundary, in tokens.
        values: predicted remaining length after each token so far.
        sent: how many of them have gone into deltas.
        thought: tokens of the thinking, where the target has a scope; None as long as it is not over.
        sequence: every state of a sequence that is only read (`lenvm_sglang.outputs.SEQUENCE_COLUMNS`).
    """

    request: LengthRequest
    stream: bool
    predicted_length: float | None = None
    quantiles: list[float | None] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    sent: int = 0
    thought: int | None = None
    sequence: list[list[float | None]] | None = None

    def take_delta(self, until: int) -> Report | None:
        """Values up to token `until` that have not been sent; None if there are none."""
        assert self.sent <= until <= len(self.values)
        fresh, self.sent = self.values[self.sent : until], until
        return {"predicted_length": self.predicted_length, "values": fresh} if fresh else None

    def report(self, completion_tokens: int) -> Report:
        """The `lenvm` object of the finished request."""
        if self.sequence is not None:
            return {"sequence": self.sequence}
        request = self.request
        report: Report = {
            "predicted_length": self.predicted_length,
            "target": request.target,
            "mode": request.mode if request.target is not None else None,
            "achieved": counted(request.scope, self.thought, completion_tokens),
        }
        if request.scope != "all":
            report["scope"] = request.scope
        if request.return_values:
            report["values"] = self.values
            report["quantiles"] = dict(zip((f"p{round(100 * p)}" for p in QUANTILES), self.quantiles, strict=False))
        return report


def split_metadata(customized: Mapping[str, list[Any]], index: int) -> tuple[dict[str, list[Any]], Report | None]:
    """Separate our entry of a batch's customised metadata from the host's own.

    Returns:
        the rest, and what the scheduler reported of request `index`.
    """
    rest = {key: values for key, values in customized.items() if key != REPORT_KEY}
    entries = customized.get(REPORT_KEY)
    reported = entries[index] if entries else None
    return rest, reported[0] if reported else None


def accumulate(state: Any, reported: Report) -> Progress | None:
    """Add the scheduler's report to what the front end knows of a request (values come in pieces while streaming).

    Args:
        state: the front end's state of the request.
        reported: from `RequestState.take_report`.

    Returns:
        None if the request has no length fields.
    """
    progress: Progress | None = state.__dict__.get("lenvm_progress")
    if progress is None:
        params = getattr(state.obj, "sampling_params", None)
        custom = params.get("custom_params") if isinstance(params, dict) else None
        request = LengthRequest.parse(custom) if isinstance(custom, dict) else None
        if request is None:
            return None
        progress = state.__dict__["lenvm_progress"] = Progress(request, bool(getattr(state.obj, "stream", False)))
    progress.values.extend(reported["values"])
    progress.predicted_length, progress.quantiles = reported["predicted_length"], reported["quantiles"]
    progress.thought, progress.sequence = reported.get("thought"), reported.get("sequence")
    return progress


def annotate_metadata(meta_info: dict[str, Any], progress: Progress, finished: bool) -> None:
    """Put what an output is to say into its metadata, for `publish`.

    The host may drop all but the last of several outputs that it had no time to hand on, so a delta is only marked
    here (by how many values there are) and taken when the output really goes out.
    """
    if progress.stream and progress.request.return_values:
        meta_info[DELTA_KEY] = (progress, len(progress.values))
    if finished:
        meta_info[REPORT_KEY] = progress.report(meta_info["completion_tokens"])


def publish(out: dict[str, Any], position: int) -> None:
    """Move an output's report and delta from its metadata to its top level, and to the middleware.

    Args:
        out: one output of the host's front end.
        position: its place in the batch, if the output does not say.
    """
    meta, said, index = out["meta_info"], collected.get(), out.get("index", position)
    if DELTA_KEY in meta:
        progress, until = meta.pop(DELTA_KEY)
        delta = progress.take_delta(until)
        if delta is not None:
            out[DELTA_KEY] = delta
            if said is not None:
                waiting = said.deltas.setdefault(index, {"values": []})
                said.deltas[index] = {**delta, "values": waiting["values"] + delta["values"]}
    report = meta.pop(REPORT_KEY, None)
    if report is not None:
        out[REPORT_KEY] = report
        if said is not None:
            said.reports[index] = report
