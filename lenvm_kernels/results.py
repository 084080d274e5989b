"""What a guidance step gives back."""

from __future__ import annotations

from enum import IntFlag
from typing import NamedTuple

import torch
from torch import Tensor


class Status(IntFlag):
    """Why a steered row was left at the base distribution; 0 is the ordinary case."""

    EMPTY = 1
    """No candidate at all: no slot with log_p above -inf. The slot drawn is the one with the lowest token id."""
    BAD_SCORES = 2
    """The scores that the row's rule reads hold NaN (or a length logit of +inf)."""
    VANISHED = 4
    """Posterior: every candidate's weight is zero, the target cannot be met from here."""


class TiltSample(NamedTuple):
    """Outcome of `tilt_sample` for R rows of K slots.

    Attributes:
        log_p: [R, K] float32 log p', normalised; -inf in empty slots. Rows that are not steered keep what came in
            (bit for bit from the kernel).
        slot: [R] int64, the slot drawn.
        token_id: [R] int64, its token.
        length: [R] float32 predicted remaining length after that token, in tokens; 0 after a stop token. None where it
            was not asked for.
        value: [R] float32 V = -sigmoid(z) of the state after it, in [-1, 0]; 0 after a stop token. The last four are
            None where no statistics were asked for.
        expected_value: [R] float32 E_p'[V].
        kl: [R] float32 KL(p' || p) over the candidate set, in nats, >= 0.
        status: [R] int32 `Status` bits.
    """

    log_p: Tensor
    slot: Tensor
    token_id: Tensor
    length: Tensor | None = None
    value: Tensor | None = None
    expected_value: Tensor | None = None
    kl: Tensor | None = None
    status: Tensor | None = None

    @classmethod
    def in_memory(cls, log_p: Tensor, memory: Tensor) -> TiltSample:
        """Everything but `log_p` in one piece of memory, [WORDS, R] int64, so that one copy takes it along. The four
        statistics lie one behind the other, as the kernel writes them."""
        rows = memory.shape[1]
        length, value, expected_value, kl = memory[2:4].view(torch.float32).view(4, rows).unbind(0)
        return cls(log_p, memory[0], memory[1], length, value, expected_value, kl, memory[4].view(torch.int32)[:rows])

    def moved(self, memory: Tensor) -> TiltSample:
        """The same in `memory`, as of `in_memory`; what is None here is not written."""
        there = TiltSample.in_memory(self.log_p, memory)
        parts: list[Tensor | None] = [self.log_p]
        for here, to in zip(self[1:], there[1:], strict=True):
            parts.append(here if here is None or to is None else to.copy_(here))
        return TiltSample(*parts)  # type: ignore[arg-type]

    def first(self, rows: int) -> TiltSample:
        """The first `rows` rows."""
        return TiltSample(*(None if t is None else t[:rows] for t in self))  # type: ignore[arg-type]


WORDS = 5
"""Of 64 bits, that a row of `TiltSample.in_memory` takes."""
