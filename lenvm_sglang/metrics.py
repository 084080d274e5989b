"""Prometheus metrics `lenvm_*`, beside SGLang's own on `/metrics`. They exist with `--enable-metrics` only.

SGLang runs prometheus_client in its multi-process mode: each process writes to files of a folder that `/metrics` adds
up, so the front end counts requests and each scheduler times its own steps. prometheus_client must not be imported
before the host has named that folder, hence the imports inside the constructors. Names and labels are documented in
docs/serving.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from lenvm.request import LengthRequest
from lenvm_kernels.results import Status
from lenvm_sglang.scope import counted

ERROR_BUCKETS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
FALLBACKS = ("not_finite", "no_weight")
"""Why a row kept the base model's distribution for a token: the value model gave NaN or infinity, or it gave no
candidate a chance of the wanted length."""


class RequestMetrics:
    """What the front end knows of finished requests with length fields."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Histogram

        labels = ("mode", "control")
        self.requests = Counter("lenvm_requests", "Finished requests with length fields.", (*labels, "finish"))
        self.tokens = Counter("lenvm_tokens", "Completion tokens of finished requests with length fields.", labels)
        self.error = Histogram(
            "lenvm_target_error_tokens",
            "Tokens between length_target and what was achieved; 0 where at_most or at_least was kept.",
            ("mode",),
            buckets=ERROR_BUCKETS,
        )

    def finished(self, request: LengthRequest, completion_tokens: int, finish: str, thought: int | None = None) -> None:
        """Count a request that ended; `thought` is the length of its thinking, where the target has a scope."""
        mode = request.mode if request.target is not None else "none"
        control = request.control_code.name.lower()
        self.requests.labels(mode, control, finish).inc()
        self.tokens.labels(mode, control).inc(completion_tokens)
        if request.target is not None and finish != "abort":
            self.error.labels(mode).observe(
                miss(request.mode, request.target, counted(request.scope, thought, completion_tokens))
            )


def miss(mode: str, target: int, achieved: int) -> int:
    """Tokens by which an answer misses what was asked."""
    over = achieved - target
    return {"equal_to": abs(over), "at_most": max(0, over), "at_least": max(0, -over)}[mode]


class StepMetrics:
    """What a scheduler knows of its value model."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Histogram

        self.rows = Counter("lenvm_steered_rows", "Tokens whose candidates the value model scored and guided.")
        self.fallbacks = Counter(
            "lenvm_fallback_rows", "Tokens that kept the base model's distribution, by reason.", ("reason",)
        )
        for reason in FALLBACKS:
            self.fallbacks.labels(reason)  # a rate needs the zero
        self.failures = Counter(
            "lenvm_failed_requests", "Requests that ended with an error because a forward of the value model raised."
        )
        self.seconds = Histogram(
            "lenvm_step_seconds",
            "Host time of the value model's part of a step: reading what the base model read, or choosing tokens.",
            ("phase",),
            buckets=SECONDS_BUCKETS,
        )

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Time a phase of a step. It does not wait for the device, whose work may go on after it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds.labels(phase).observe(time.perf_counter() - began)


@dataclass(frozen=True)
class FallbackOutput:
    """Which rows of a step fell back, on its way to the host with the sampled tokens; counted there.

    Attributes:
        metrics: where.
        status: [R] int32 `lenvm_kernels.Status` bits.
    """

    metrics: StepMetrics
    status: Tensor

    def copy_to_host(self, copy_tensor: Callable[[Tensor], Tensor]) -> FallbackOutput:
        """Called by the host when it copies the sampled tokens."""
        return FallbackOutput(self.metrics, copy_tensor(self.status))

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Called by the host after it committed the tokens."""
        bits = self.status.tolist()
        self.metrics.rows.inc(len(bits))
        broken = sum(bool(b & Status.BAD_SCORES) for b in bits)
        for reason, count in zip(FALLBACKS, (broken, sum(map(bool, bits)) - broken), strict=True):
            if count:
                self.metrics.fallbacks.labels(reason).inc(count)


@cache
def request_metrics() -> RequestMetrics:
    """The one of this process (prometheus_client refuses a second)."""
    return RequestMetrics()


@cache
def step_metrics() -> StepMetrics:
    """The one of this process."""
    return StepMetrics()
