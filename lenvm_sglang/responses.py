"""The `lenvm` object of responses: from the host's metadata to the client.

The host's front end hands finished outputs through one async generator (`TokenizerManager.generate_request`), inside
the task of the HTTP request. There the object is built; the ASGI middleware, which started the task, finds it in a
context variable and writes it into OpenAI-shaped bodies, whose own schemas drop unknown fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from lenvm.request import LengthRequest
from lenvm_sglang.outputs import QUANTILES, REPORT_KEY

Report = dict[str, Any]
"""`{"predicted_length", "target", "mode", "achieved"}`; with `return_length_values` also "values" and "quantiles"."""

collected: ContextVar[dict[int, Report] | None] = ContextVar("lenvm_collected", default=None)
"""Reports of the current HTTP request by choice index; None outside a request with length fields."""


def split_metadata(customized: Mapping[str, list[Any]], index: int) -> tuple[dict[str, list[Any]], Report | None]:
    """Separate our entry of a batch's customised metadata from the host's own.

    Returns:
        the rest, and what the scheduler reported of request `index`.
    """
    rest = {key: values for key, values in customized.items() if key != REPORT_KEY}
    entries = customized.get(REPORT_KEY)
    reported = entries[index] if entries else None
    return rest, reported[0] if reported else None


def accumulate(state: Any, reported: Report) -> None:
    """Add the scheduler's report to the front end's state of a request (values come in pieces while streaming)."""
    kept = state.__dict__.setdefault("lenvm_report", {"values": []})
    kept["values"].extend(reported["values"])
    kept["predicted_length"], kept["quantiles"] = reported["predicted_length"], reported["quantiles"]


def final_report(state: Any, completion_tokens: int) -> Report | None:
    """The `lenvm` object of a finished request; None if it has no length fields."""
    params = getattr(state.obj, "sampling_params", None)
    custom = params.get("custom_params") if isinstance(params, dict) else None
    request = LengthRequest.parse(custom) if isinstance(custom, dict) else None
    if request is None:
        return None
    kept = state.__dict__.get("lenvm_report", {})
    report: Report = {
        "predicted_length": kept.get("predicted_length"),
        "target": request.target,
        "mode": request.mode if request.target is not None else None,
        "achieved": completion_tokens,
    }
    if request.return_values:
        report["values"] = kept.get("values", [])
        report["quantiles"] = dict(
            zip((f"p{round(100 * p)}" for p in QUANTILES), kept.get("quantiles", []), strict=False)
        )
    return report


def publish(out: dict[str, Any], position: int) -> None:
    """Move a finished output's report from its metadata to its top level, and to the middleware.

    Args:
        out: one output of the host's front end.
        position: its place in the batch, if the output does not say.
    """
    report = out["meta_info"].pop(REPORT_KEY, None)
    if report is None:
        return
    out[REPORT_KEY] = report
    reports = collected.get()
    if reports is not None:
        reports[out.get("index", position)] = report
