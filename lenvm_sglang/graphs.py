"""The value model's forwards as CUDA graphs, one for each bucket of rows and of candidates a row.

A forward of a decode step is hundreds of launches of a few microseconds; a graph is one. A graph reads and writes fixed
memory, so what is read and where it stands are written there, by the launches that find them (`place_candidates`,
`build_candidates`); what rows ask for it reads in the table of running requests. Rows that a batch does not fill stand
for nobody: no prefix, slot 0, the host's dump, and row 0 of its request pool, which it gives to no request.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lenvm_kernels import CandidateRows

Recorded = tuple[Callable[[], object], Any]
"""What does a step again, and where its outcome is then."""
Record = Callable[[Callable[[], Any]], Recorded]

MOST_ROWS = 128
MOST_CANDIDATES = 2048
"""Of the largest graph; a larger batch is bound by its arithmetic and runs without one."""
_TOLERANCE = 1e-2
"""Of z and log-probabilities of half precision forwards. A graph that runs the same kernels differs by nothing."""


class GraphError(RuntimeError):
    """A graph that says something else than the forward it was made of."""


class Fixed(NamedTuple):
    """What a forward of b x k candidates reads.

    Attributes:
        placed: where they stand.
        token_ids: [b, k] int64.
        rotary: [b * k] int64 rotary positions, for a model that reads images.
    """

    placed: CandidateRows
    token_ids: Tensor
    rotary: Tensor | None

    @classmethod
    def empty(cls, rows: int, width: int, images: bool, device: torch.device) -> Fixed:
        """Room for `width` candidates in each of `rows` rows."""
        ids = torch.zeros(rows, width, dtype=torch.int64, device=device)
        return cls(CandidateRows.empty(rows, width, device), ids, torch.zeros_like(ids).flatten() if images else None)


class Step(ABC):
    """What is to become a graph: a forward, and what is done with it.

    Attributes:
        fixed: the memory that it reads, filled with something that can be computed.
        turns: how often it is compared, on something else each time.
    """

    fixed: Fixed
    turns: int = 1

    @abstractmethod
    def run(self) -> Any:
        """Do it; the outcome is tensors."""

    @abstractmethod
    def change(self, turn: int) -> int:
        """Fill the memory with something else in each turn from 1 on, and fewer rows; gives their number."""

    @abstractmethod
    def compare(self, outcome: Any, rows: int) -> None:
        """A graph's outcome with what it should be, in the first rows. What the others say is left to chance: all of
        theirs stands in one slot.

        Raises:
            GraphError: they differ.
        """


class Graph(NamedTuple):
    """A recorded step.

    Attributes:
        step: whose memory it reads.
        replay: does it again.
        outcome: of the last time.
    """

    step: Any
    replay: Callable[[], object]
    outcome: Any


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


class Graphs:
    """Graphs of steps of one kind.

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


def make_graphs(
    make: Callable[[int, int], Step],
    buckets: Iterable[tuple[int, int]],
    recorder: Callable[[], AbstractContextManager[Record]],
) -> tuple[Graphs, dict[tuple[int, int], Exception]]:
    """A graph of each bucket, compared with its step on input that it was not recorded with.

    Args:
        make: a bucket's step.
        buckets: (rows, candidates a row).
        recorder: makes a graph of a step.

    Returns:
        The graphs, and what kept the others from being made: whatever a driver raises, or a GraphError.
    """
    made: dict[tuple[int, int], Graph] = {}
    failed: dict[tuple[int, int], Exception] = {}
    with recorder() as record:
        # the largest first, so that smaller ones find room in the memory that it took
        for size in sorted(buckets, key=lambda s: s[0] * s[1], reverse=True):
            try:
                step = make(*size)
                made[size] = Graph(step, *record(step.run))
            except Exception as error:
                failed[size] = error
    # what a host does at the end of its recording is done, and each has seen what the others did to their memory
    for size, graph in made.items():
        try:
            for turn in range(1, graph.step.turns + 1):
                rows = graph.step.change(turn)
                graph.replay()
                graph.step.compare(graph.outcome, rows)
        except Exception as error:
            failed[size] = error
    return Graphs({size: graph for size, graph in made.items() if size not in failed}), failed


def check_close(found: Tensor, wanted: Tensor, what: str) -> None:
    """Two outcomes of the same forward.

    Raises:
        GraphError: they differ.
    """
    if not torch.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
        worst = float((found - wanted).abs().max())
        raise GraphError(f"the graph of {what} differs from its forward by {worst:.3g}")


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

        def record(step: Callable[[], Any]) -> Recorded:
            for _ in range(2):  # compile, allocate
                step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=context.stream):
                outcome = step()
            return graph.replay, outcome

        yield record
