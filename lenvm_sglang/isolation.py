"""When a forward of the value model raises: find the requests that it raises for, and let the others go on.

A forward is over many requests. If it raises, it is done again for each of them alone (which also needs less memory);
those for which it raises again are out, and nothing of them is steered or reported any more. What a forward writes, it
writes to slots of its own rows, so doing it again does no harm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from lenvm_sglang.processor import Drawn, LengthValueLogitProcessor, SamplingStep
from lenvm_sglang.rows import LengthRows
from lenvm_sglang.state import RequestState

logger = logging.getLogger(__name__)
Failed = list[tuple[RequestState, Exception]]


def one_by_one(rows: LengthRows, act: Callable[[LengthRows], None]) -> Failed:
    """`act` on all rows at once; if that raises, on each alone.

    Returns:
        The requests for which it raised.
    """
    try:
        act(rows)
        return []
    except Exception as error:
        if len(rows.index) == 1:
            logger.error("lenvm: the value model failed.", exc_info=error)
            return [(rows.states[0], error)]
        logger.warning("lenvm: the value model failed (%s); its %d rows one by one.", error, len(rows.index))
    return [failure for i in range(len(rows.index)) for failure in one_by_one(rows.only([i]), act)]


def follow(processor: LengthValueLogitProcessor, batch: Any, rows: LengthRows, output: Any) -> tuple[list[Any], Failed]:
    """`LengthValueLogitProcessor.follow`: what it says, and for whom it raised."""
    outputs: list[Any] = []
    failed = one_by_one(rows, lambda part: outputs.extend(processor.follow(batch, part, output)))
    return outputs, failed


def steer(step: SamplingStep) -> Failed:
    """`LengthValueLogitProcessor.steer`: rows for which it raised keep the host's logits."""
    done: list[Drawn] = []

    def act(part: LengthRows) -> None:
        step.steered = part
        done.append(step.processor.steer(step))

    if step.steered is None:
        return []
    failed = one_by_one(step.steered, act)
    step.steered = None
    if done:
        step.drawn = done[0] if len(done) == 1 else Drawn.of(done)
    return failed


def watch(step: SamplingStep, token_ids: torch.Tensor) -> Failed:
    """`LengthValueLogitProcessor.watch`, and for whom it raised."""

    def act(part: LengthRows) -> None:
        step.watched = part
        step.processor.watch(step, token_ids)

    return [] if step.watched is None else one_by_one(step.watched, act)
