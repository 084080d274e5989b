"""Graphs of the candidates' forward without a GPU: buckets, what a graph is checked for, what happens when none can be
made. `test_paths` replays them in the host's scheduler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lenvm.guidance import Scores
from lenvm.request import LengthRequest
from lenvm_sglang.forwards import FusedForward
from lenvm_sglang.graphs import MOST_ROWS, Fixed, ForwardGraphs, GraphError, Record, bucket, row_buckets, width_buckets
from lenvm_sglang.rows import LengthRows, Place
from lenvm_sglang.scope import Scope, ThinkTags
from lenvm_sglang.state import RequestState, RowTable
from tests.sglang.paths import again
from tests.sglang.test_parts import state

CPU = torch.device("cpu")


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_bucket_is_the_smallest_that_fits(most: int, size: int) -> None:
    for buckets, limit in ((row_buckets(most), min(most, MOST_ROWS)), (width_buckets(most), most)):
        assert buckets == sorted(set(buckets))
        assert (buckets[0], buckets[-1]) == (1, limit)
        found = bucket(size, buckets)
        assert (found is None) == (size > limit)
        if found is not None:
            assert found >= size
            assert not any(size <= b < found for b in buckets)


def test_few_rows_are_computed_for_nobody() -> None:
    buckets = row_buckets(MOST_ROWS)
    assert all((bucket(n, buckets) or 0) - n < max(8, n / 4) for n in range(1, MOST_ROWS + 1))


def make(rows: int, width: int) -> tuple[Fixed, Callable[[], Scores]]:
    """A forward whose scores are its tokens."""
    fixed = Fixed.empty(rows, width, False, CPU)
    return fixed, lambda: Scores(fixed.token_ids.view(rows, width).float() * 2, None)


def test_a_graph_is_found_by_its_bucket_and_reads_its_memory() -> None:
    with again() as record:
        graphs = ForwardGraphs(make, [1, 4], [1, 3], record)
    assert len(graphs) == 4
    graph = graphs.find(2, 3)
    assert graph is not None
    graph.fixed.token_ids[:6] = torch.arange(6)
    graph.replay()
    assert graph.scores.z[:2].tolist() == [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]
    assert graphs.find(5, 3) is None
    assert graphs.find(1, 2) is None


@contextmanager
def stale() -> Iterator[Record]:
    """A graph that does nothing when it is replayed."""
    yield lambda forward: (lambda: None, Scores(forward().z + 1.0, None))


def test_a_graph_that_says_something_else_is_an_error() -> None:
    with stale() as record, pytest.raises(GraphError, match="2 x 3 candidates differs from its forward by 1"):
        ForwardGraphs(make, [2], [3], record)


@contextmanager
def broken() -> Iterator[Record]:
    raise RuntimeError("operation not permitted when stream is capturing")
    yield


@pytest.mark.parametrize(("recorder", "says"), [(stale, "differs from its forward"), (broken, "is capturing")])
def test_where_no_graph_can_be_made_the_log_says_so(
    recorder: Any, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FusedForward, "_probe", lambda self, rows, width: make(rows, width))
    pool = SimpleNamespace(req_to_token=torch.zeros(3, 9, dtype=torch.int32))
    worker: Any = SimpleNamespace(
        pool=None, base=SimpleNamespace(req_to_token_pool=pool), request_rows=2, widths=[1, 3]
    )
    forward = FusedForward(worker)
    with caplog.at_level(logging.WARNING, logger="lenvm_sglang"):
        forward.capture(recorder)
    assert forward.graphs is None
    assert "no CUDA graphs of the value model" in caplog.text
    assert says in caplog.text


def place_of(*states: RequestState) -> Place:
    count = len(states)
    table = RowTable(count, "cpu")
    table.write(torch.arange(count), states)
    batch = SimpleNamespace(seq_lens=torch.full((count,), 9), batch_size=count, req_pool_indices=torch.arange(count))
    rows = LengthRows(list(range(count)), list(states), [True] * count, [True] * count)
    return Place(batch, rows, table, torch.zeros(count, 16, dtype=torch.int64), width_buckets(16), 1000)


@pytest.mark.parametrize(
    ("top_ks", "width"), [([1], 1), ([3], 4), ([4], 4), ([2, 4], 4), ([5], 16), ([4, 1000], 16), ([1000], 16)]
)
def test_a_forward_is_as_wide_as_the_widest_top_k(top_ks: list[int], width: int) -> None:
    assert place_of(*(state(top_k=k) for k in top_ks)).width == width


def test_an_end_tag_that_is_probed_has_a_slot_of_its_own() -> None:
    request = LengthRequest.parse({"length_target": 9, "length_scope": "thinking"})
    thinking = state(top_k=4, request=request, scope=Scope("thinking", ThinkTags(7, 8)))
    assert thinking.think_end == 8
    assert place_of(thinking).width == 16
