"""Graphs of the candidates' forward without a GPU: buckets, what a graph is checked for, what happens when none can be
made. `test_paths` replays them in the host's scheduler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.inprocess import again
from lenvm.guidance import Control, Scores
from lenvm.request import LengthRequest
from lenvm_kernels import WORDS, TiltSample
from lenvm_sglang.attention import AttentionError
from lenvm_sglang.fused import Drawing, FusedForward, Outcome, TokenStep, ValueStep
from lenvm_sglang.graphs import (
    MOST_CANDIDATES,
    MOST_ROWS,
    Fixed,
    Graph,
    GraphError,
    Record,
    Recorded,
    bucket,
    buckets,
    make_graphs,
    row_buckets,
    width_buckets,
)
from lenvm_sglang.rows import LengthRows, Place
from lenvm_sglang.scope import Scope, ThinkTags
from lenvm_sglang.state import RequestState, RowTable
from tests.sglang.test_parts import state

CPU = torch.device("cpu")


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_bucket_is_the_smallest_that_fits(most: int, size: int) -> None:
    for sizes, limit in ((row_buckets(most), min(most, MOST_ROWS)), (width_buckets(most), most)):
        assert sizes == sorted(set(sizes))
        assert (sizes[0], sizes[-1]) == (1, limit)
        found = bucket(size, sizes)
        assert (found is None) == (size > limit)
        if found is not None:
            assert found >= size
            assert not any(size <= b < found for b in sizes)


def test_few_rows_are_computed_for_nobody() -> None:
    sizes = row_buckets(MOST_ROWS)
    assert all((bucket(n, sizes) or 0) - n < max(8, n / 4) for n in range(1, MOST_ROWS + 1))


def test_no_graph_is_larger_than_what_pays() -> None:
    found = buckets(4096, width_buckets(128))
    assert max(rows * width for rows, width in found) == MOST_CANDIDATES
    assert (MOST_ROWS, 16) in found
    assert (MOST_ROWS, 64) not in found


def make(rows: int, width: int) -> ValueStep:
    """A forward whose scores are its tokens, and a draw that takes the highest."""
    fixed = Fixed.empty(rows, width, False, CPU)

    def draw(step: ValueStep, scores: Scores) -> TiltSample:
        slot = scores.z.argmax(-1)
        return TiltSample(scores.z, slot, fixed.token_ids.gather(1, slot[:, None])[:, 0]).moved(step.drawing.results)

    def refill(turn: int) -> int:
        fixed.token_ids.add_(3)
        return max(rows - 1, 1)

    sizes = ((rows, width), torch.float32), ((rows, width), torch.bool), ((WORDS, rows), torch.int64)
    drawing = Drawing(*(torch.zeros(shape, dtype=dtype) for shape, dtype in sizes))
    return ValueStep(fixed, drawing, lambda: Scores(fixed.token_ids.float() * 2, None), draw, refill)


def test_a_graph_is_found_by_its_bucket_and_reads_its_memory() -> None:
    graphs, failed = make_graphs(make, [(1, 1), (4, 1), (1, 3), (4, 3)], again)
    assert len(graphs) == 4
    assert not failed
    graph = graphs.find(2, 3)
    assert graph is not None
    graph.step.fixed.token_ids[:2] = torch.arange(6).view(2, 3)
    graph.replay()
    assert graph.outcome.scores.z[:2].tolist() == [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]
    assert graph.outcome.sample is not None
    assert graph.outcome.sample.token_id[:2].tolist() == [2, 5]
    assert graphs.find(5, 3) is None
    assert graphs.find(1, 2) is None


@contextmanager
def frozen() -> Iterator[Record]:
    """Graphs into which their input was baked when they were recorded."""

    def record(step: Callable[[], Outcome]) -> Recorded:
        scores, sample = step()
        return (lambda: None), Outcome(Scores(scores.z.clone(), None), sample)

    yield record


@contextmanager
def misled() -> Iterator[Record]:
    """Their draw is not of their scores."""
    with again() as one:

        def record(step: Callable[[], Outcome]) -> Recorded:
            replay, outcome = one(step)
            assert outcome.sample is not None
            drawn = outcome.sample.token_id

            def late() -> None:
                replay()
                drawn.sub_(3)

            return late, outcome

        yield record


@contextmanager
def no_room() -> Iterator[Record]:
    """There is memory for small graphs only."""

    def record(step: Callable[[], Outcome]) -> Recorded:
        if step().scores.z.numel() > 3:
            raise MemoryError("out of memory")
        with again() as one:
            return one(step)

    yield record


@contextmanager
def broken() -> Iterator[Record]:
    raise RuntimeError("operation not permitted when stream is capturing")
    yield


def test_a_graph_that_says_something_else_is_left_out() -> None:
    graphs, failed = make_graphs(make, [(2, 3)], frozen)
    assert len(graphs) == 0
    assert isinstance(failed[2, 3], GraphError)
    assert "2 x 3 candidates differs from its forward by 6" in str(failed[2, 3])
    graphs, failed = make_graphs(make, [(2, 3)], misled)
    assert len(graphs) == 0
    assert "2 x 3 candidates draws with another token_id than its scores call for" in str(failed[2, 3])


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 6, 8])
def test_each_graph_is_compared_under_every_control(rows: int) -> None:
    seen: set[int] = set()
    worker: Any = SimpleNamespace(request_rows=17, sees_images=False, vocabulary=99, pool=None, chosen=None, widths=[3])
    table = RowTable(17, "cpu")
    worker.places = SimpleNamespace(scratch=torch.arange(17 * 3).view(17, 3), table=table)
    worker.base = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(17, 9, dtype=torch.int32)))
    forward = FusedForward(worker)
    with table.made_up():
        step = forward._step(rows, 3)
        for turn in range(1, step.turns + 1):
            count = step.change(turn)
            seen |= set(table.rules().guidance.control[step.fixed.placed.pool_rows[:count]].tolist())
    assert seen == set(map(int, Control))
    assert not table.ints.any()


def test_a_graphs_draw_is_that_of_the_candidates_in_its_memory() -> None:
    worker: Any = SimpleNamespace(pool=None, base=SimpleNamespace(req_to_token_pool=None), widths=[3])
    forward, step = FusedForward(worker), make(4, 3)
    step.fixed.token_ids.copy_(torch.arange(12).view(4, 3))
    graph = Graph(step, lambda: None, step.run())
    step.drawing.results[2:4].view(torch.float32)[0, :4] = torch.tensor([1.5, 2.5, 3.5, 4.5])  # lengths
    place: Any = SimpleNamespace(states=[None] * 2)
    here = step.candidates(2)
    forward._replayed = graph
    sample = forward.drawn(place, here)
    assert sample is not None and sample.length is not None
    step.drawing.results.zero_()  # by the next step
    assert sample.token_id.tolist() == [2, 5]
    assert sample.length.tolist() == [1.5, 2.5]
    assert forward.drawn(place, here) is None  # once
    forward._replayed = graph
    assert forward.drawn(place, replace(here, log_p=here.log_p.clone())) is None


@pytest.mark.parametrize(("off", "left"), [(0.0, 1), (0.001, 1), (0.1, 0)])
def test_states_are_compared_by_the_largest_number_in_them(off: float, left: int) -> None:
    fixed, states = Fixed.empty(4, 1, False, CPU), torch.randn(4, 8) * 50
    states[:, 0] = 200
    found = states.clone()

    @contextmanager
    def recorder() -> Iterator[Record]:
        yield lambda step: ((lambda: found[1].add_(off * 200)), found)

    graphs, failed = make_graphs(
        lambda rows, width: TokenStep(fixed, lambda: states, lambda turn: 3), [(4, 1)], recorder
    )
    assert len(graphs) == left
    if failed:
        assert "the graph of 4 tokens differs from its forward by 0.1" in str(failed[4, 1])


@contextmanager
def dumping() -> Iterator[Record]:
    """What a row says that stands for nobody is left to chance."""

    def record(step: Callable[[], Outcome]) -> Recorded:
        outcome = step()

        def replay() -> None:
            outcome.scores.z.copy_(step().scores.z)
            outcome.scores.z[1:] = torch.nan

        return replay, Outcome(outcome.scores, None)

    yield record


def test_rows_that_stand_for_nobody_are_not_compared() -> None:
    graphs, failed = make_graphs(make, [(2, 3), (3, 3)], dumping)
    assert graphs.find(2, 3) is not None
    assert set(failed) == {(3, 3)}


def test_a_batch_whose_graph_is_missing_takes_a_larger_one_or_none() -> None:
    graphs, failed = make_graphs(make, [(1, 3), (2, 3), (3, 1)], no_room)
    assert set(failed) == {(2, 3)}
    assert graphs.find(1, 3) is not None
    assert graphs.find(2, 3) is None
    larger = graphs.find(2, 1)
    assert larger is not None
    assert larger.outcome.scores.z.shape == (3, 1)


@pytest.mark.parametrize(
    ("recorder", "says", "left"),
    [(frozen, "differs from its forward", 0), (broken, "is capturing", 0), (no_room, "out of memory", 3)],
)
def test_what_graphs_cannot_be_made_the_log_says(
    recorder: Any, says: str, left: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FusedForward, "_step", lambda self, rows, width: make(rows, width))
    monkeypatch.setattr(FusedForward, "_made_up_prefixes", lambda self: nullcontext())
    worker: Any = SimpleNamespace(
        pool=None, base=SimpleNamespace(req_to_token_pool=None), request_rows=2, widths=[1, 3]
    )
    forward = FusedForward(worker)
    with caplog.at_level(logging.WARNING, logger="lenvm_sglang"):
        forward.capture(recorder)
    assert (0 if forward.graphs is None else len(forward.graphs)) == left
    assert f"{4 - left} of 4 CUDA graphs of the value model could not be made" in caplog.text
    assert says in caplog.text


def test_a_forward_that_raises_leaves_the_candidates_to_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lenvm_sglang import worker as module

    class Unfit:
        def probe(self) -> None:
            raise AttentionError("the model asks for sinks too")

    monkeypatch.setattr(module, "HostForward", lambda worker: "the host's")
    worker = object.__new__(module.ValueWorker)
    worker.candidates = Unfit()  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING, logger="lenvm_sglang"):
        worker.warm_up()
    assert worker.candidates == "the host's"  # type: ignore[comparison-overlap]
    assert "AttentionError: the model asks for sinks too" in caplog.text


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
