"""The value model's one forward over the candidates of a step, in the ways that a host may call for.

`HostForward`: the host's attention, to which K candidates are K decode rows; for backbones and KV caches that our
kernel does not read. `GatheredForward` (a CPU, where the host has no fused attention): plain torch, and only candidates
that exist are fed. `lenvm_sglang.fused.FusedForward` (a GPU): attention of our own kernel, which reads each prefix
once, and CUDA graphs.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lenvm.candidates import Candidates
from lenvm.guidance import Scores
from lenvm_kernels import CandidateRows, Keep, RequestTables, TiltSample, extent, keep_chosen, place_candidates
from lenvm_sglang.attention import SharedPrefixBackend
from lenvm_sglang.batches import DecodeBatch
from lenvm_sglang.graphs import Graph
from lenvm_sglang.rows import LengthRows, Place
from lenvm_sglang.versions import bind_slots

if TYPE_CHECKING:
    from lenvm_sglang.worker import ValueWorker

VIRTUAL_ROWS = 1024
"""Most candidate rows of one forward where the host's attention needs a request table for them (its size is this many
times the context length)."""


class CandidateForward(ABC):
    """Scores the states after each candidate in one forward; their KV stays in scratch.

    Attributes:
        backend: the attention that the forward runs under.
    """

    backend: Any

    def __init__(self, worker: ValueWorker) -> None:
        self.worker = worker
        self.batch = DecodeBatch()

    def follow(self, batch: Any, rows: LengthRows, place: Place, keep: Keep) -> None:
        """After the base model's forward of a decode step: the KV of the candidates chosen last, `keep`, and whatever
        else of the step can be done before the logits are looked at."""
        keep_chosen(keep, place.slots)

    def emitted(self, batch: Any, place: Place) -> Tensor:
        """[R] tokens that the rows' targets have counted before this step's."""
        return place.emitted(batch)

    def memory(self, batch: Any, place: Place) -> Candidates | None:
        """[R, K'] memory for the step's candidates, from where they are scored and drawn; None where any will do."""
        return None

    def drawn(self, place: Place, candidates: Candidates) -> TiltSample | None:
        """What the last `score` drew from the candidates [R, K'] as their rows ask, and noted for the next `follow`;
        None where it drew nothing. Not to be asked for where a rule was changed after it (`lenvm_sglang.scope.aim`)."""
        return None

    @abstractmethod
    def score(self, batch: Any, place: Place, candidates: Candidates, value: bool) -> Scores:
        """Scores [R, K']; zeros in slots that were not fed. z is not to be read where it was not wanted.

        Args:
            batch: the host's forward batch.
            place: R rows of it.
            candidates: [R, K'] with K' <= K.
            value: whether z is wanted.
        """

    @abstractmethod
    def probe(self) -> None:
        """Before anything is served: score one candidate behind a short prefix.

        Raises:
            Exception: this way cannot score candidates here.
        """

    def run(self, batch: Any, shape: tuple[int, ...], value: bool = True) -> Scores:
        """The forward and the heads of a decode batch of ours; scores of the shape."""
        hidden = self.worker.forward(batch, self.backend)
        return self.worker.scores_of(hidden.view(*shape, -1), value)


class GatheredForward(CandidateForward):
    """On a CPU, where asking which slots hold a candidate waits for nobody: only those are fed."""

    def __init__(self, worker: ValueWorker) -> None:
        super().__init__(worker)
        self.backend = SharedPrefixBackend(worker.pool, worker.base.req_to_token_pool, worker.runner.dtype)

    def probe(self) -> None:
        """As in the base class."""
        own, zero = self.worker.places.scratch[:1, :1], torch.zeros(1, dtype=torch.int64)
        where = self.backend.prepare(zero, zero + 1, 1, own)
        rotary = where.positions if self.worker.sees_images else None
        self.run(self.batch.fill(zero, where.positions, where.lengths, own.flatten(), rotary), (1, 1))

    def score(self, batch: Any, place: Place, candidates: Candidates, value: bool) -> Scores:
        """As in the base class."""
        rows, width = candidates.token_ids.shape
        own, fed = place.scratch[:, :width], None
        tokens, slots = candidates.token_ids.flatten(), own.flatten()
        if width > 1 and extent(candidates)[1] < rows * width:
            kept = candidates.kept.clone()
            kept[:, 0] = True  # a row without a candidate is fed one all the same
            fed = kept.flatten().nonzero()[:, 0]
            own = own.masked_fill(~kept, 0)
        longest = max(self.worker.host_lengths(batch, place).tolist())
        where = self.backend.prepare(place.slots, place.take(batch.seq_lens), longest, own, fed)
        given: Any = tokens, where.positions, where.lengths, slots, self.worker.rotary(place, where.positions, width)
        if fed is None:
            return self.run(self.batch.fill(*given), (rows, width), value)
        given = [None if x is None else x[fed] for x in given]
        scores = self.run(self.batch.fill(*given), (len(fed),), value)

        def spread(x: Tensor) -> Tensor:
            x = x.new_zeros(rows * width, *x.shape[1:]).index_copy_(0, fed, x)
            return x.view(rows, width, *x.shape[1:])

        return Scores(spread(scores.z), None if scores.length_log_q is None else spread(scores.length_log_q))


class Placed(NamedTuple):
    """Where the candidates of one step stand.

    Attributes:
        batch, place: of the step.
        width: candidates a row.
        rows: their places; of more rows than the step's if they are in a graph's memory.
        graph: whose memory it is.
    """

    batch: Any
    place: Place
    width: int
    rows: CandidateRows
    graph: Graph | None = None

    def of(self, batch: Any, place: Place, width: int) -> bool:
        """Whether these are `width` candidates in each row of `place` in this step."""
        return self.batch is batch and self.place is place and self.width == width


class PlacedForward(CandidateForward):
    """Candidates are placed in the launch that keeps the last ones' KV, if all rows of the step are scored together."""

    _placed: Placed | None = None

    @abstractmethod
    def _place(self, batch: Any, place: Place, width: int, keep: Keep | None) -> Placed:
        """Put `width` candidates of each row into their places; first give the last chosen ones their slots."""

    def _fits(self, place: Place, width: int) -> bool:
        return True

    def follow(self, batch: Any, rows: LengthRows, place: Place, keep: Keep) -> None:
        """As in the base class."""
        self._placed = None
        alike = len(set(rows.steered)) == 1  # otherwise steered and watched rows are scored apart
        width = place.width if rows.steered[0] else 1
        if alike and self._fits(place, width):
            self._placed = self._place(batch, place, width, keep)
        else:
            keep_chosen(keep, place.slots)

    def emitted(self, batch: Any, place: Place) -> Tensor:
        """As in the base class."""
        placed = self._placed
        if placed is not None and placed.batch is batch and placed.place is place:
            return placed.rows.emitted[: len(place.states)]
        return place.emitted(batch)

    def _take(self, batch: Any, place: Place, width: int) -> Placed:
        """What `follow` placed, once; placed now if it was something else."""
        placed, self._placed = self._placed, None
        if placed is None or not placed.of(batch, place, width):
            return self._place(batch, place, width, None)
        return placed


class HostForward(PlacedForward):
    """The host's own attention: candidates are decode rows of a request table of ours."""

    def __init__(self, worker: ValueWorker) -> None:
        super().__init__(worker)
        base, runner = worker.base, worker.runner
        real = base.req_to_token_pool.req_to_token
        self.tables = RequestTables(
            real, torch.zeros(VIRTUAL_ROWS, real.shape[1], dtype=real.dtype, device=real.device)
        )
        self.table_rows = torch.arange(VIRTUAL_ROWS, device=real.device)
        pool = copy.copy(base.req_to_token_pool)
        pool.req_to_token, pool.size = self.tables.virtual, VIRTUAL_ROWS
        runner.req_to_token_pool = pool
        runner.init_kv_index_translator()
        runner.init_attention_backends()
        self.backend, self.slots = runner.attn_backend, runner.kv_index_translator

    def probe(self) -> None:
        """What the host's own attention can do is known: nothing is tried."""

    def _fits(self, place: Place, width: int) -> bool:
        return len(place.states) * width <= VIRTUAL_ROWS

    def _place(self, batch: Any, place: Place, width: int, keep: Keep | None) -> Placed:
        longest = max(self.worker.host_lengths(batch, place).tolist())
        here = place.take(batch.seq_lens), place.parameters.start, place.slots, place.scratch[:, :width]
        return Placed(batch, place, width, place_candidates(*here, self.tables, longest, keep))

    def score(self, batch: Any, place: Place, candidates: Candidates, value: bool) -> Scores:
        """As in the base class; `VIRTUAL_ROWS` candidates at a time."""
        token_ids = candidates.token_ids
        rows, width = token_ids.shape
        mirror = self.worker.host_lengths(batch, place)
        if rows * width <= VIRTUAL_ROWS:
            placed = self._take(batch, place, width).rows
            return self._score(place, slice(None), placed, mirror, token_ids, value)
        self._placed = None
        step, start, parts = VIRTUAL_ROWS // width, place.parameters.start, []
        lengths = place.take(batch.seq_lens)
        for part in (slice(i, i + step) for i in range(0, rows, step)):
            here = lengths[part], start[part], place.slots[part], place.scratch[part, :width]
            found = place_candidates(*here, self.tables, max(mirror[part].tolist()))
            parts.append(self._score(place, part, found, mirror[part], token_ids[part], value))
        log_q = [p.length_log_q for p in parts if p.length_log_q is not None]
        return Scores(torch.cat([p.z for p in parts]), torch.cat(log_q) if log_q else None)

    def _score(self, place: Place, part: slice, placed: CandidateRows, mirror: Tensor, token_ids: Tensor,
               value: bool) -> Scores:  # fmt: skip
        rows, width = token_ids.shape
        rotary = self.worker.rotary(place, placed.positions, width, part)
        batch = self.batch.fill(token_ids.reshape(-1), placed.positions, placed.lengths, placed.own, rotary)
        batch.req_pool_indices = self.table_rows[: rows * width]
        # what the host's backends size their buffers by
        lengths = np.repeat(mirror.numpy() + 1, width)
        batch.seq_lens_cpu, batch.seq_lens_sum = torch.from_numpy(lengths), int(lengths.sum())
        return self.run(batch, (rows, width), value)

    def run(self, batch: Any, shape: tuple[int, ...], value: bool = True) -> Scores:
        """As in the base class."""
        bind_slots(self.slots, batch)
        self.backend.init_forward_metadata(batch)
        return super().run(batch, shape, value)
