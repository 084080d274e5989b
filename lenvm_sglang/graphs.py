"""The value model's forward over candidates as CUDA graphs, one for each bucket of rows and candidates.

A forward of a decode step is hundreds of launches of a few microseconds; a graph is one. A graph reads and writes fixed
memory, so where candidates stand is written there (`place_candidates`, in the launch that it takes anyway), and their
ids are copied there. Rows that a batch does not fill stand for nobody: no prefix, and slot 0, the host's dump.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lenvm.guidance import Scores
from lenvm_kernels import CandidateRows

Recorded = tuple[Callable[[], object], Scores]
"""What does a forward again, and where its scores are then."""
Record = Callable[[Callable[[], Scores]], Recorded]

MOST_ROWS = 128
"""Rows of the largest graph; a larger batch is bound by its arithmetic and runs without one."""
_TOLERANCE = 1e-2
"""Of z and log-probabilities of half precision forwards. A graph that runs the same kernels differs by nothing."""


class GraphError(RuntimeError):
    """A graph that says something else than the forward it was made of."""


class Fixed(NamedTuple):
    """What a forward of b x k candidates reads.

    Attributes:
        placed: where they stand.
        token_ids: [b * k] int64.
        rotary: [b * k] int64 rotary positions, for a model that reads images.
    """

    placed: CandidateRows
    token_ids: Tensor
    rotary: Tensor | None

    @classmethod
    def empty(cls, rows: int, width: int, images: bool, device: torch.device) -> Fixed:
        """Room for `width` candidates in each of `rows` rows."""
        ids = torch.zeros(rows * width, dtype=torch.int64, device=device)
        return cls(CandidateRows.empty(rows, width, device), ids, torch.zeros_like(ids) if images else None)


class Graph(NamedTuple):
    """A recorded forward.

    Attributes:
        fixed: what it reads.
        replay: does it again.
        scores: [b, k], of the last time.
    """

    fixed: Fixed
    replay: Callable[[], object]
    scores: Scores


def row_buckets(most: int) -> list[int]:
    """Rows of the graphs: close enough to each other that few rows are computed for nobody."""
    most = min(most, MOST_ROWS)
    return [n for n in (1, 2, 4, *range(8, 64, 8), *range(64, MOST_ROWS, 16)) if n < most] + [most]


def width_buckets(most: int) -> list[int]:
    """Candidates a row of the forwards: 1 (rows that are only watched), 4, 16, ... and `most`."""
    return [4**i for i in range(8) if 4**i < most] + [most]


def bucket(size: int, buckets: Sequence[int]) -> int | None:
    """The smallest of the ascending `buckets` that holds `size`; None if none does."""
    at = bisect_left(buckets, size)
    return buckets[at] if at < len(buckets) else None


class ForwardGraphs:
    """Graphs of one forward, by bucket.

    Args:
        make: gives a bucket's memory, filled with something that can be computed, and the forward on it.
        rows, widths: the buckets, ascending.
        record: makes a graph of a forward (`cuda_recorder`).

    Raises:
        GraphError: a graph's scores are not those of the forward.
    """

    def __init__(
        self,
        make: Callable[[int, int], tuple[Fixed, Callable[[], Scores]]],
        rows: Sequence[int],
        widths: Sequence[int],
        record: Record,
    ) -> None:
        self.rows = rows
        self._graphs: dict[tuple[int, int], Graph] = {}
        # the largest first, so that smaller ones find room in the memory that it took
        for count in reversed(rows):
            for width in reversed(widths):
                fixed, forward = make(count, width)
                replay, scores = record(forward)
                graph = Graph(fixed, replay, scores)
                _check(graph, forward)
                self._graphs[count, width] = graph

    def __len__(self) -> int:
        return len(self._graphs)

    def find(self, rows: int, width: int) -> Graph | None:
        """The graph for so many rows, or more, of `width` candidates each."""
        count = bucket(rows, self.rows)
        return None if count is None else self._graphs.get((count, width))


def _check(graph: Graph, forward: Callable[[], Scores]) -> None:
    graph.replay()
    wanted = forward()
    for a, b in ((graph.scores.z, wanted.z), (graph.scores.length_log_q, wanted.length_log_q)):
        if a is None or b is None:
            continue
        if not torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True):
            rows, width = graph.scores.z.shape
            worst = float((a - b).abs().max())
            raise GraphError(f"the graph of {rows} x {width} candidates differs from its forward by {worst:.3g}")


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

        def record(forward: Callable[[], Scores]) -> Recorded:
            for _ in range(2):  # compile, allocate
                forward()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=context.stream):
                scores = forward()
            return graph.replay, scores

        yield record
