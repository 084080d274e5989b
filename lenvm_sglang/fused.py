"""Forwards under our own attention kernel, and CUDA graphs of them: over the candidates of a step, with the heads and
the draw, and over the one token that a lookahead head looks ahead from. The host is not asked for lengths."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lenvm.candidates import Candidates
from lenvm.guidance import Control, Scores
from lenvm_kernels import (
    WORDS,
    CandidateRows,
    DrawBuffers,
    Keep,
    TiltSample,
    keep_chosen,
    place_candidates,
    tilt_sample,
)
from lenvm_kernels.dispatch import MAX_CANDIDATES
from lenvm_sglang.attention import FusedPrefixBackend
from lenvm_sglang.batches import DecodeBatch
from lenvm_sglang.forwards import Placed, PlacedForward
from lenvm_sglang.graphs import (
    MOST_ROWS,
    Fixed,
    Graph,
    GraphError,
    Graphs,
    Record,
    Step,
    buckets,
    check_close,
    cuda_recorder,
    make_graphs,
)
from lenvm_sglang.rows import Place

if TYPE_CHECKING:
    from lenvm_sglang.worker import ValueWorker

logger = logging.getLogger(__name__)

_PREFIX = 7
"""Tokens of the longest prefix that a forward is tried on before anything is served."""
_PREFIX_SLOTS = 64
"""KV slots that those prefixes are in, from the host's dump on."""


class Captured(ABC):
    """A forward under `attend_prefix`, launch by launch, or as CUDA graphs once `capture` has made them.

    Attributes:
        worker: whose forward it is.
        backend: its attention.
        batch: what the host's model is given.
        widths: candidates a row that it may have, ascending.
        graphs: None runs it launch by launch.
    """

    worker: ValueWorker
    backend: FusedPrefixBackend
    batch: DecodeBatch
    widths: Sequence[int]
    graphs: Graphs | None = None

    @abstractmethod
    def make_step(self, fixed: Fixed, change: Callable[[int], int]) -> ValueStep | TokenStep:
        """What becomes a graph on the memory `fixed`; `change` is as of `Step`."""

    @abstractmethod
    def made_up_slots(self, pool_rows: Tensor, width: int) -> Tensor:
        """[R, width] int64 KV slots that nobody reads, for what is tried before anything is served."""

    def probe(self) -> None:
        """Before anything is served: run it on one candidate behind a short prefix.

        Raises:
            Exception: this way does not work here.
        """
        with self._made_up_prefixes():
            self._step(1, 1).forward()

    def capture(self, recorder: Callable[[], AbstractContextManager[Record]] = cuda_recorder) -> None:
        """Make the graphs. Where some cannot be made, the log says why, and batches of their size run without."""
        wanted = buckets(self.worker.request_rows, self.widths)
        failed: dict[tuple[int, int], Exception] = {}
        try:
            with self._made_up_prefixes():
                self.graphs, failed = make_graphs(self._step, wanted, recorder)
        except Exception as of_all:  # of the recorder itself
            failed = dict.fromkeys(wanted, of_all)
        if failed:
            error = next(iter(failed.values()))
            logger.warning(
                "lenvm: %d of %d CUDA graphs of the value model could not be made (%s: %s); batches of their size run "
                "without, which is slower. Please report this.",
                len(failed), len(wanted), type(error).__name__, error, exc_info=error,
            )  # fmt: skip
        logger.info("lenvm: %d CUDA graphs of the value model", len(wanted) - len(failed))

    def find(self, rows: int, width: int) -> Graph | None:
        """The graph for so many rows of `width` candidates each, if there is one."""
        return None if self.graphs is None else self.graphs.find(rows, width)

    def fill(self, placed: CandidateRows, token_ids: Tensor, rotary: Tensor | None) -> Any:
        """The host's batch of candidates `token_ids` [R * K] at their places, for a forward under `backend`."""
        self.backend.rows = placed.shared(self.worker.base.req_to_token_pool.req_to_token)
        return self.batch.fill(token_ids, placed.positions, placed.lengths, placed.own, rotary)

    def bring(self, fixed: Fixed, place: Place, token_ids: Tensor) -> None:
        """Tokens [R, K], whose places are in the memory of a graph, and what a model that reads images needs beside."""
        rows, width = token_ids.shape
        if token_ids.data_ptr() != fixed.token_ids.data_ptr():
            fixed.token_ids[:rows].copy_(token_ids)
        rotary = self.worker.rotary(place, fixed.placed.positions[: rows * width], width)
        if rotary is not None and fixed.rotary is not None:
            fixed.rotary[: rows * width].copy_(rotary)

    def _step(self, rows: int, width: int) -> ValueStep | TokenStep:
        device = self.worker.base.req_to_token_pool.req_to_token.device
        fixed = Fixed.empty(rows, width, self.worker.sees_images, device)
        self._fill(fixed, rows, width, 0)
        return self.make_step(fixed, lambda turn: self._fill(fixed, max(rows - 1, 1), width, turn))

    def _fill(self, fixed: Fixed, rows: int, width: int, turn: int) -> int:
        """Candidates behind short prefixes in so many rows, of other rules and others in each turn; gives the number of
        rows."""
        n = torch.arange(rows, device=fixed.token_ids.device)
        pool_rows = (n + turn).flip(0) % self.worker.request_rows
        lengths = n * (3 + 2 * turn) % _PREFIX + 1
        place_candidates(lengths, n * 0, pool_rows, self.made_up_slots(pool_rows, width), into=fixed.placed)
        ids = torch.arange(fixed.token_ids.numel(), device=n.device).view_as(fixed.token_ids)
        fixed.token_ids.copy_((ids * (1 + 6 * turn) + turn) % self.worker.vocabulary)
        if fixed.rotary is not None:
            fixed.rotary.copy_(fixed.placed.positions + turn)
        return rows

    @contextmanager
    def _made_up_prefixes(self) -> Iterator[None]:
        """Before anything is served: prefixes of tokens with random KV in the request table, and rows of every control
        and mode, taken away afterwards."""
        table, pool = self.worker.base.req_to_token_pool.req_to_token, self.worker.pool
        caches = [*pool.k_buffer, *pool.v_buffer]
        slots = min(_PREFIX_SLOTS, self.worker.base.token_to_kv_pool.size)
        before = table[:, :_PREFIX].clone(), [cache[: slots + MOST_ROWS].clone() for cache in caches]
        every = torch.arange(before[0].numel(), device=table.device).view_as(before[0])
        table[:, :_PREFIX] = (every * 5 % (slots - 1) + 1).to(table.dtype)
        for cache in caches:
            cache[:slots].normal_()
        try:
            with self.worker.places.table.made_up():
                yield
        finally:
            table[:, :_PREFIX] = before[0]
            for cache, was in zip(caches, before[1], strict=True):
                cache[: len(was)] = was


class Outcome(NamedTuple):
    """Of a value step.

    Attributes:
        scores: [R, K].
        sample: what was drawn with them; None where the draw is made elsewhere.
    """

    scores: Scores
    sample: TiltSample | None


class Drawing(NamedTuple):
    """What a draw reads beside `Fixed`, and where it writes.

    Attributes:
        log_p: [b, k] float32, as of `Candidates`.
        is_stop: [b, k] bool, likewise.
        results: [WORDS, b] int64, as of `TiltSample.in_memory`.
    """

    log_p: Tensor
    is_stop: Tensor
    results: Tensor


@dataclass
class ValueStep(Step):
    """Candidates are scored and one is drawn.

    Attributes:
        drawing: memory of the draw.
        forward: scores the candidates in `fixed`.
        draw: draws from them by scores [b, k]; gives None where the draw is made elsewhere.
        refill: fills `fixed` anew, as of `Step.change`: the rule of row r in turn t is that of row r + t of the table.
    """

    fixed: Fixed
    drawing: Drawing
    forward: Callable[[], Scores]
    draw: Callable[[ValueStep, Scores], TiltSample | None]
    refill: Callable[[int], int]

    def __post_init__(self) -> None:
        if len(self.fixed.token_ids) <= len(Control):  # few rows do not see every control at once
            self.turns = len(Control)
        self._fill(0)

    def candidates(self, rows: int) -> Candidates:
        """Those of the first `rows` rows."""
        return Candidates(self.fixed.token_ids[:rows], self.drawing.log_p[:rows], self.drawing.is_stop[:rows])

    def run(self) -> Outcome:
        """As in the base class."""
        scores = self.forward()
        return Outcome(scores, self.draw(self, scores))

    def change(self, turn: int) -> int:
        """As in the base class."""
        self._fill(turn)
        return self.refill(turn)

    def _fill(self, turn: int) -> None:
        """Candidates of several probabilities, some of them stop tokens, and some slots empty."""
        ids = torch.arange(self.drawing.log_p.numel(), device=self.drawing.log_p.device)
        ids = ids.view_as(self.drawing.log_p)
        log_p = -((ids * 7 + turn) % 5).to(self.drawing.log_p.dtype)
        self.drawing.log_p.copy_(log_p.masked_fill(ids % 7 == 5, -torch.inf))
        self.drawing.is_stop.copy_(ids % 11 == 3 + turn)

    def compare(self, outcome: Outcome, rows: int) -> None:
        """The scores with those of the forward, and what was drawn with what the scores call for."""
        found, wanted = outcome.scores, self.forward()
        size = f"{' x '.join(map(str, found.z.shape))} candidates"
        for a, b in ((found.z, wanted.z), (found.length_log_q, wanted.length_log_q)):
            if a is not None and b is not None:
                check_close(a[:rows], b[:rows], size)
        if outcome.sample is None:
            return
        drawn = outcome.sample.moved(torch.empty_like(self.drawing.results))
        redrawn = self.draw(self, found)
        assert redrawn is not None
        for name, a, b in zip(TiltSample._fields, drawn.first(rows), redrawn.first(rows), strict=True):
            if a is not None and b is not None and not torch.equal(a.nan_to_num(), b.nan_to_num()):
                raise GraphError(f"the graph of {size} draws with another {name} than its scores call for")


class FusedForward(Captured, PlacedForward):
    """Scores the candidates of a step; its graphs draw one, too."""

    _replayed: Graph | None = None

    def __init__(self, worker: ValueWorker) -> None:
        PlacedForward.__init__(self, worker)
        self.backend = FusedPrefixBackend(worker.pool, worker.base.req_to_token_pool)
        self.widths = worker.widths

    def probe(self) -> None:
        """As in the base class; the launch that also keeps KV is compiled too."""
        scratch = self.worker.places.scratch
        keep_chosen(Keep(self.worker.kv, self.worker.chosen, scratch[:1, 0]), torch.zeros_like(scratch[:1, 0]))
        super().probe()

    def _place(self, batch: Any, place: Place, width: int, keep: Keep | None) -> Placed:
        graph = self.find(len(place.states), width)
        here = place.take(batch.seq_lens), place.parameters.start, place.slots, place.scratch[:, :width]
        placed = place_candidates(*here, keep=keep, into=None if graph is None else graph.step.fixed.placed)
        return Placed(batch, place, width, placed, graph)

    def score(self, batch: Any, place: Place, candidates: Candidates, value: bool) -> Scores:
        """As in the base class."""
        width = candidates.token_ids.shape[1]
        placed = self._take(batch, place, width)
        self._replayed = placed.graph
        if placed.graph is None:
            rotary = self.worker.rotary(place, placed.rows.positions, width)
            return self._forward(placed.rows, candidates.token_ids.reshape(-1), rotary, value)
        return self.replay(placed.graph, place, candidates.token_ids)

    def memory(self, batch: Any, place: Place) -> Candidates | None:
        """As in the base class."""
        if self.graphs is None:
            return None
        placed = self._placed = self._take(batch, place, place.width)
        if placed.graph is None:
            return None
        found: Candidates = placed.graph.step.candidates(len(place.states))
        return found

    def drawn(self, place: Place, candidates: Candidates) -> TiltSample | None:
        """As in the base class; one launch, because the next step overwrites the graph's memory. The candidates' own
        log p' stay there."""
        graph, self._replayed = self._replayed, None
        # its ids are always there, its log p only if `memory` was asked for; who leaves candidates out makes a new one
        if graph is None or candidates.log_p.data_ptr() != graph.step.drawing.log_p.data_ptr():
            return None
        sample = graph.outcome.sample
        if sample is None:
            return None
        return TiltSample.in_memory(sample.log_p, graph.step.drawing.results.clone()).first(len(place.states))

    def replay(self, graph: Graph, place: Place, token_ids: Tensor) -> Scores:
        """Scores [R, K] of the candidates `token_ids` [R, K], whose places are in the graph's memory."""
        self.bring(graph.step.fixed, place, token_ids)
        graph.replay()
        scores, rows = graph.outcome.scores, len(token_ids)
        return Scores(scores.z[:rows], None if scores.length_log_q is None else scores.length_log_q[:rows])

    def _forward(self, placed: CandidateRows, token_ids: Tensor, rotary: Tensor | None, value: bool = True) -> Scores:
        batch = self.fill(placed, token_ids, rotary)
        return self.run(batch, tuple(self.backend.rows.own.shape), value)

    def _draw(self, step: ValueStep, scores: Scores) -> TiltSample | None:
        """As the table of running requests says that the candidates' rows ask. One candidate a row is nearly always of
        rows that are only watched."""
        rows, width = step.fixed.token_ids.shape
        if not 1 < width <= MAX_CANDIDATES:
            return None
        worker, placed = self.worker, step.fixed.placed
        rules, own = worker.places.table.rules(), placed.own.view(rows, width)
        return tilt_sample(
            step.candidates(rows),
            scores,
            replace(rules.guidance, emitted=placed.emitted),
            worker.lenvm,
            rules.seed,
            rules.greedy,
            into=DrawBuffers(None, None, worker.chosen, placed.pool_rows, own, step.drawing.results),
            ruled_by=placed.pool_rows,
        )

    def make_step(self, fixed: Fixed, change: Callable[[int], int]) -> ValueStep:
        """As in the base class."""
        ids = fixed.token_ids
        results = torch.zeros(WORDS, len(ids), dtype=torch.int64, device=ids.device)
        drawing = Drawing(torch.zeros_like(ids, dtype=torch.float32), torch.zeros_like(ids, dtype=torch.bool), results)
        return ValueStep(
            fixed, drawing, lambda: self._forward(fixed.placed, ids.view(-1), fixed.rotary), self._draw, change
        )

    def made_up_slots(self, pool_rows: Tensor, width: int) -> Tensor:
        """Of scratch."""
        return self.worker.places.scratch[pool_rows, :width]


@dataclass
class TokenStep(Step):
    """Tokens are read.

    Attributes:
        forward: hidden states [b, H] of the tokens in `fixed`.
        refill: as of `Step.change`.
    """

    fixed: Fixed
    forward: Callable[[], Tensor]
    refill: Callable[[int], int]

    def run(self) -> Tensor:
        """As in the base class."""
        return self.forward()

    def change(self, turn: int) -> int:
        """As in the base class."""
        return self.refill(turn)

    def compare(self, outcome: Tensor, rows: int) -> None:
        """States of half precision, relative to the largest number in each."""
        found, wanted = outcome[:rows].float(), self.forward()[:rows].float()
        scale = wanted.abs().amax(-1, keepdim=True).clamp(min=1e-6)
        check_close(found / scale, wanted / scale, f"{len(outcome)} tokens")


class TokenForward(Captured):
    """Reads the token that each row was just fed, in the slot that the host gave it."""

    widths = (1,)

    def __init__(self, worker: ValueWorker) -> None:
        self.worker, self.batch = worker, DecodeBatch()
        self.backend = FusedPrefixBackend(worker.pool, worker.base.req_to_token_pool)

    def read(self, batch: Any, place: Place) -> Tensor:
        """The value model's states [R, H] after it; until the next call.

        Args:
            batch: the host's forward batch of a decode step.
            place: R rows of it.
        """
        rows, token_ids = len(place.states), place.take(batch.input_ids)
        new = place.take(batch.out_cache_loc).long()[:, None]
        graph = self.find(rows, 1)
        here = place.take(batch.seq_lens) - 1, place.parameters.start, place.slots, new
        placed = place_candidates(*here, into=None if graph is None else graph.step.fixed.placed)
        if graph is None:
            return self._forward(placed, token_ids, self.worker.rotary(place, placed.positions, 1))
        self.bring(graph.step.fixed, place, token_ids[:, None])
        graph.replay()
        states: Tensor = graph.outcome[:rows]
        return states

    def _forward(self, placed: CandidateRows, token_ids: Tensor, rotary: Tensor | None) -> Tensor:
        hidden: Tensor = self.worker.forward(self.fill(placed, token_ids, rotary), self.backend)
        return hidden

    def make_step(self, fixed: Fixed, change: Callable[[int], int]) -> TokenStep:
        """As in the base class."""
        return TokenStep(fixed, lambda: self._forward(fixed.placed, fixed.token_ids.view(-1), fixed.rotary), change)

    def made_up_slots(self, pool_rows: Tensor, width: int) -> Tensor:
        """Behind those of the made-up prefixes."""
        return (_PREFIX_SLOTS + pool_rows % MOST_ROWS)[:, None] % self.worker.base.token_to_kv_pool.size
