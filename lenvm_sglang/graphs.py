"""The value model's forward over candidates, its heads and the draw as CUDA graphs, one for each bucket of rows and
candidates.

A forward of a decode step is hundreds of launches of a few microseconds; a graph is one. A graph reads and writes fixed
memory, so the candidates and where they stand are written there, by the launches that find them (`place_candidates`,
`build_candidates`); what their rows ask for it reads in the table of running requests. Rows that a batch does not fill
stand for nobody: no prefix, slot 0, the host's dump, and row 0 of its request pool, which it gives to no request.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lenvm.candidates import Candidates
from lenvm.guidance import Scores
from lenvm_kernels import WORDS, CandidateRows, TiltSample


class Outcome(NamedTuple):
    """Of a value step.

    Attributes:
        scores: [R, K].
        sample: what was drawn with them, its results in `Fixed.results`; None where the draw is made elsewhere.
    """

    scores: Scores
    sample: TiltSample | None


Recorded = tuple[Callable[[], object], Outcome]
"""What does a step again, and where its outcome is then."""
Record = Callable[[Callable[[], Outcome]], Recorded]

MOST_ROWS = 128
MOST_CANDIDATES = 2048
"""Of the largest graph; a larger batch is bound by its arithmetic and runs without one."""
_TOLERANCE = 1e-2
"""Of z and log-probabilities of half precision forwards. A graph that runs the same kernels differs by nothing."""


class GraphError(RuntimeError):
    """A graph that says something else than the forward it was made of."""


class Fixed(NamedTuple):
    """The memory of a value step of b x k candidates.

    Attributes:
        placed: where they stand.
        token_ids: [b, k] int64.
        log_p: [b, k] float32, as of `Candidates`.
        is_stop: [b, k] bool, likewise.
        rotary: [b * k] int64 rotary positions, for a model that reads images.
        results: [WORDS, b] int64, of the draw.
    """

    placed: CandidateRows
    token_ids: Tensor
    log_p: Tensor
    is_stop: Tensor
    rotary: Tensor | None
    results: Tensor

    @classmethod
    def empty(cls, rows: int, width: int, images: bool, device: torch.device) -> Fixed:
        """Room for `width` candidates in each of `rows` rows."""
        ids = torch.zeros(rows, width, dtype=torch.int64, device=device)
        return cls(
            CandidateRows.empty(rows, width, device),
            ids,
            torch.zeros_like(ids, dtype=torch.float32),
            torch.zeros_like(ids, dtype=torch.bool),
            torch.zeros_like(ids).flatten() if images else None,
            torch.zeros(WORDS, rows, dtype=torch.int64, device=device),
        )

    def candidates(self, rows: int) -> Candidates:
        """Those of the first `rows` rows."""
        return Candidates(self.token_ids[:rows], self.log_p[:rows], self.is_stop[:rows])


class Graph(NamedTuple):
    """A recorded value step of b x k candidates.

    Attributes:
        fixed: its memory.
        replay: does it again.
        outcome: of the last time.
    """

    fixed: Fixed
    replay: Callable[[], object]
    outcome: Outcome


def row_buckets(most: int) -> list[int]:
    """Rows of the graphs: close enough to each other that few rows are computed for nobody."""
    most = min(most, MOST_ROWS)
    return [n for n in (1, 2, 4, *range(8, 64, 8), *range(64, MOST_ROWS, 16)) if n < most] + [most]


def width_buckets(most: int) -> list[int]:
    """Candidates a row of the forwards: 1 (rows that are only watched), 4, 16, ... and `most`."""
    return [4**i for i in range(8) if 4**i < most] + [most]


def buckets(most_rows: int, widths: Sequence[int]) -> list[tuple[int, int]]:
    """(rows, candidates a row) of the graphs."""
    return [(n, w) for n in row_buckets(most_rows) for w in widths if n * w <= MOST_CANDIDATES]


def bucket(size: int, buckets: Sequence[int]) -> int | None:
    """The smallest of the ascending `buckets` that holds `size`; None if none does."""
    at = bisect_left(buckets, size)
    return buckets[at] if at < len(buckets) else None


class ForwardGraphs:
    """Graphs of the value step.

    Args:
        graphs: by bucket, (rows, candidates a row).
    """

    def __init__(self, graphs: dict[tuple[int, int], Graph]) -> None:
        self._graphs = graphs
        self._rows = {width: sorted(r for r, w in graphs if w == width) for _, width in graphs}

    def __len__(self) -> int:
        return len(self._graphs)

    def find(self, rows: int, width: int) -> Graph | None:
        """The smallest graph for so many rows of `width` candidates each."""
        count = bucket(rows, self._rows.get(width, ()))
        return None if count is None else self._graphs[count, width]


class Bucket(NamedTuple):
    """A value step that is to become a graph.

    Attributes:
        fixed: its memory, filled with something that can be computed.
        forward: scores the candidates there.
        draw: draws from them by scores [b, k]; gives None where the draw is made elsewhere.
        change: fills the memory with something else, and fewer rows; gives their number.
    """

    fixed: Fixed
    forward: Callable[[], Scores]
    draw: Callable[[Scores], TiltSample | None]
    change: Callable[[], int]

    def step(self) -> Outcome:
        """Both, as they are recorded."""
        scores = self.forward()
        return Outcome(scores, self.draw(scores))


def make_graphs(
    make: Callable[[int, int], Bucket],
    buckets: Iterable[tuple[int, int]],
    recorder: Callable[[], AbstractContextManager[Record]],
) -> tuple[ForwardGraphs, dict[tuple[int, int], Exception]]:
    """A graph of each bucket, compared with its step on input that it was not recorded with.

    Args:
        make: a bucket's memory and step.
        buckets: (rows, candidates a row).
        recorder: makes a graph of a step.

    Returns:
        The graphs, and what kept the others from being made: whatever a driver raises, or a GraphError.
    """
    made: dict[tuple[int, int], tuple[Graph, Bucket]] = {}
    failed: dict[tuple[int, int], Exception] = {}
    with recorder() as record:
        # the largest first, so that smaller ones find room in the memory that it took
        for size in sorted(buckets, key=lambda s: s[0] * s[1], reverse=True):
            try:
                one = make(*size)
                made[size] = Graph(one.fixed, *record(one.step)), one
            except Exception as error:
                failed[size] = error
    # what a host does at the end of its recording is done, and each has seen what the others did to their memory
    for size, (graph, one) in made.items():
        try:
            rows = one.change()
            graph.replay()
            _compare(graph.outcome, one, rows)
        except Exception as error:
            failed[size] = error
    return ForwardGraphs({size: graph for size, (graph, _) in made.items() if size not in failed}), failed


def _compare(outcome: Outcome, one: Bucket, rows: int) -> None:
    """A graph's scores with those of its forward, and what it drew with what its own scores call for. Of the first
    rows; the others' candidates all stand in one slot, and say what the last to be written there says.

    Raises:
        GraphError: they differ.
    """
    found, wanted, size = outcome.scores, one.forward(), " x ".join(map(str, outcome.scores.z.shape))
    for a, b in ((found.z, wanted.z), (found.length_log_q, wanted.length_log_q)):
        if a is not None and b is not None and not torch.allclose(a[:rows], b[:rows], rtol=_TOLERANCE, atol=_TOLERANCE):
            worst = float((a[:rows] - b[:rows]).abs().max())
            raise GraphError(f"the graph of {size} candidates differs from its forward by {worst:.3g}")
    if outcome.sample is None:
        return
    drawn, redrawn = outcome.sample.moved(torch.empty_like(one.fixed.results)), one.draw(found)
    assert redrawn is not None
    for name, a, b in zip(TiltSample._fields, drawn.first(rows), redrawn.first(rows), strict=True):
        if a is not None and b is not None and not torch.equal(a.nan_to_num(), b.nan_to_num()):
            raise GraphError(f"the graph of {size} candidates draws with another {name} than its scores call for")


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Nothing that exists is looked at by the garbage collection that torch does before each graph."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def cuda_recorder() -> Iterator[Record]:
    """Records CUDA graphs as the host does, into memory of their own: the base model's graphs would write over the
    scores of a shared one."""
    from sglang.srt.distributed.parallel_state import graph_capture
    from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode

    pool = torch.cuda.graph_pool_handle()
    with _frozen_heap(), model_capture_mode(), graph_capture() as context:

        def record(step: Callable[[], Outcome]) -> Recorded:
            for _ in range(2):  # compile, allocate
                step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=context.stream):
                outcome = step()
            return graph.replay, outcome

        yield record
