"""The rows of a batch that carry length fields: which they are, and where they stand on the device."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lenvm_sglang.state import RequestState, RowTable, to_device

_PLACES = 4
"""Sets of rows kept: the length fields' rows, the steered and the watched among them, of a decode and a prefill."""


@dataclass(frozen=True)
class LengthRows:
    """The rows of one batch that carry length fields; for the next decode step too, if nothing changes.

    Attributes:
        index: positions in the batch, ascending.
        states: their request objects.
        draws: for each, whether a token is drawn after this forward (not from all but the last chunk of a chunked
            prefill, nor from a request that only reads its prompt).
        steered: for each, whether that token is guided.
        moved: those (positions in `states`) whose target begins to count with this decode step.
    """

    index: list[int]
    states: list[RequestState]
    draws: list[bool]
    steered: list[bool]
    moved: Sequence[int] = ()

    def __post_init__(self) -> None:
        assert len(self.index) == len(self.states) == len(self.draws) == len(self.steered) > 0

    @cached_property
    def steering(self) -> LengthRows | None:
        """The rows whose token is drawn here, but for failed ones; None if there are none."""
        return self._drawing(steered=True)

    @cached_property
    def watching(self) -> LengthRows | None:
        """The rows that draw a token and are not steered, but for failed ones; None if there are none."""
        return self._drawing(steered=False)

    def anew(self) -> LengthRows:
        """The same rows, nothing remembered of which of them have failed."""
        return replace(self)

    def _drawing(self, steered: bool) -> LengthRows | None:
        wanted = [
            draws and is_steered == steered and not state.failed
            for draws, is_steered, state in zip(self.draws, self.steered, self.states, strict=True)
        ]
        if all(wanted):
            return self.anew()  # not `self`, which would then hold itself
        keep = [i for i, is_wanted in enumerate(wanted) if is_wanted]
        return self.only(keep) if keep else None

    def only(self, keep: Sequence[int]) -> LengthRows:
        """Some of the rows, by their positions in `states`."""
        moved = [new for new, old in enumerate(keep) if old in self.moved]
        return LengthRows(
            [self.index[i] for i in keep],
            [self.states[i] for i in keep],
            [self.draws[i] for i in keep],
            [self.steered[i] for i in keep],
            moved,
        )


class Place:
    """Where rows of a batch stand, on the device. Made when a batch changes, not at each step.

    Attributes:
        states: their request objects.
        whole: they are the whole batch, in its order.
        index: [R] int64 positions in the batch.
        host_index: the same on the host.
        slots: [R] int64 rows of the host's request pool.
        scratch: [R, K] int64 KV slots of their candidates; [R, 0] where candidates are not fed.
        width: slots that hold every candidate of each of them, by their top-k: one of `widths`.
        present: the controls among them.
        strict: one of them has `length_strict`.
        reach: how many of the most probable tokens have to be ordered for them.
        thinking: the target of one of them counts the thinking.
        reported: those that report the length after each token; None for none of them.
        shift: [R] int64 their `rotary_shift`; None where all are 0.
    """

    def __init__(
        self, batch: Any, rows: LengthRows, table: RowTable, scratch: Tensor, widths: Sequence[int], vocabulary: int
    ) -> None:
        device = batch.seq_lens.device
        self.states = rows.states
        self.whole = len(rows.index) == batch.batch_size
        self.host_index = rows.index
        self.index = to_device(rows.index, torch.int64, device)
        self.slots = batch.req_pool_indices[self.index].long()
        self.scratch = scratch[self.slots]
        filtered = any(s.top_k < vocabulary or s.top_p < 1 or s.min_p > 0 for s in rows.states)
        self.parameters = table.parameters(
            self.slots,
            max(len(s.stop_token_ids) for s in rows.states),
            unfiltered=not filtered,
            no_min_p=not any(s.min_p > 0 for s in rows.states),
            no_whole_top_p=not any(s.top_p < 1 and s.top_k >= vocabulary for s in rows.states),
            no_temperature=all(s.temperature == 1 for s in rows.states),
        )
        self.present = frozenset(s.request.control_code for s in rows.states)
        self.strict = any(s.request.strict for s in rows.states)
        self.thinking = any(s.think_end >= 0 for s in rows.states)
        # the states are on the host; an end tag that is probed takes a slot
        most = max(s.top_k + (s.think_end >= 0) for s in rows.states)
        self.width = widths[min(bisect_left(widths, most), len(widths) - 1)]
        # with no top-k on, ordering K tokens is enough
        self.reach = max([self.width, *(s.top_k for s in rows.states if s.top_k < vocabulary)])
        wanted = [i for i, s in enumerate(rows.states) if s.request.return_values]
        shifts = [s.rotary_shift for s in rows.states]
        self.shift = to_device(shifts, torch.int64, device) if any(shifts) else None
        self.reported: Reported | None = None
        if wanted:
            part = None if len(wanted) == len(rows.states) else to_device(wanted, torch.int64, device)
            self.reported = Reported([rows.index[i] for i in wanted], [rows.states[i] for i in wanted], part)

    def take(self, batch_rows: Tensor) -> Tensor:
        """These rows of a tensor whose first dimension is the batch."""
        return batch_rows if self.whole else batch_rows[self.index]

    def emitted(self, batch: Any) -> Tensor:
        """[R] int64 tokens that the rows' targets have counted, of a batch before it draws."""
        return self.take(batch.seq_lens) - self.parameters.start


class Places:
    """The places of recent batches, because a batch of the same rows keeps its place from step to step.

    Args:
        table: parameters of the running requests.
        scratch: [request rows, K] int64 KV slots of candidates, [request rows, 0] where candidates are not fed.
        widths: how many candidates a row a forward may have, ascending; the last is K.
        vocabulary: of the base model.
    """

    def __init__(self, table: RowTable, scratch: Tensor, widths: Sequence[int], vocabulary: int) -> None:
        self.table, self.scratch, self.widths, self.vocabulary = table, scratch, widths, vocabulary
        self._known: dict[tuple[object, ...], Place] = {}

    def find(self, batch: Any, rows: LengthRows) -> Place:
        """Where `rows` stand; from the last step, if nothing has changed since."""
        key = (batch.batch_size, *rows.index, *map(id, rows.states))
        place = self._known.get(key)
        # a place keeps its states alive, so an id is not given to another object meanwhile
        if place is None:
            place = Place(batch, rows, self.table, self.scratch, self.widths, self.vocabulary)
            while len(self._known) >= _PLACES:
                self._known.pop(next(iter(self._known)))
            self._known[key] = place
        return place

    def step(self, batch: Any, rows: LengthRows) -> Place:
        """Where the rows of a decode step stand, the parameters of those whose target begins to count written anew."""
        if rows.moved:
            moved = to_device([rows.index[i] for i in rows.moved], torch.int64, batch.seq_lens.device)
            self.write(batch.req_pool_indices[moved].long(), [rows.states[i] for i in rows.moved])
        return self.find(batch, rows)

    def write(self, slots: Tensor, states: Sequence[RequestState]) -> None:
        """New requests in the rows `slots` [R] int64: their parameters, and nothing known of where they stand."""
        self.table.write(slots, states)
        self._known.clear()


@dataclass(frozen=True)
class Reported:
    """Rows whose predicted lengths are reported.

    Attributes:
        index: positions in the batch.
        states: their request objects.
        part: [len(index)] which of the place's rows they are; None: all.
    """

    index: list[int]
    states: list[RequestState]
    part: Tensor | None


class Seen(NamedTuple):
    """A prompt with images as the base model was given it, whose forward forgets both.

    Attributes:
        input_ids: [T] a hash of its image in the place of every image token.
        images: for each row of the batch its images, the host's object, or None.
    """

    input_ids: Tensor
    images: list[Any]


class Read(NamedTuple):
    """What the value model read in a prefill, N rows with length fields.

    Attributes:
        hidden: [T, H] of all their tokens, row after row.
        prefixes: [N] tokens that each row had read before.
        lengths: [N] tokens of each row now.
    """

    hidden: Tensor
    prefixes: list[int]
    lengths: list[int]
