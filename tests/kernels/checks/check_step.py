"""What surrounds the candidates' forward, and where `tilt_sample` writes its draw, against plain torch."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from lenvm.candidates import Candidates, SamplingRows
from lenvm.guidance import GuidanceRows
from lenvm_kernels import (
    WORDS,
    CandidateRows,
    DrawBuffers,
    Keep,
    PrefixMasks,
    RequestTables,
    SlotBuffers,
    TiltSample,
    build_candidates,
    extent,
    keep_chosen,
    place_candidates,
    reference,
    share_prefix,
    tilt_sample,
)
from tests.kernels.checks import quick, rows

assert quick
CPU = torch.device("cpu")
POOL, CONTEXT, SLOTS, WIDTH = 9, 2600, 400, 5


class Pools:
    """A host's request pool, KV of three dtypes and widths, and scratch; the same numbers each time."""

    def __init__(self, device: str = "cpu") -> None:
        g = torch.Generator().manual_seed(0)
        self.requests = torch.randint(0, SLOTS, (POOL, CONTEXT), generator=g, dtype=torch.int32).to(device)
        self.virtual = torch.full((POOL * WIDTH, CONTEXT), -1, dtype=torch.int32, device=device)
        shapes = (((2, 3), torch.float32), ((3, 700), torch.bfloat16), ((5,), torch.uint8))
        given = [(torch.randn(SLOTS, *shape, generator=g) * 9).to(dtype).to(device) for shape, dtype in shapes]
        self.kv = SlotBuffers(given)
        self.scratch = torch.arange(SLOTS - POOL * 7, SLOTS, device=device).view(POOL, 7)
        self.chosen = self.scratch[:, 3].clone()


def placed_twice(
    lengths: torch.Tensor,
    start: torch.Tensor,
    pool_rows: torch.Tensor,
    target: torch.Tensor | None,
    longest: int = 0,
    room: int | None = None,
) -> tuple[Pools, Pools, CandidateRows]:
    """Candidates placed by the kernel and by the reference, which agree in what they return and in the KV.

    Args:
        lengths, start, pool_rows: of the rows.
        target: where the last choices' KV goes; None: it is left.
        longest: with request tables, if it is not 0.
        room: rows of the memory that is written, full of something else; None: new memory.
    """
    ours, theirs = Pools(), Pools()
    found, wanted = (
        place(
            lengths,
            start,
            pool_rows,
            pools.scratch[pool_rows, :WIDTH],
            RequestTables(pools.requests, pools.virtual) if longest else None,
            longest,
            None if target is None else Keep(pools.kv, pools.chosen, target),
            None if room is None else CandidateRows(*(t.fill_(99) for t in CandidateRows.empty(room, WIDTH, CPU))),
        )
        for place, pools in ((place_candidates, ours), (reference.place_candidates, theirs))
    )
    for a, b in zip((*found, *ours.kv.buffers), (*wanted, *theirs.kv.buffers), strict=True):
        assert torch.equal(a, b)
    return ours, theirs, found


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("kept", [True, False])
def test_candidates_are_placed_and_the_last_choice_is_kept(dtype: torch.dtype, kept: bool) -> None:
    lengths = torch.tensor([1, 1023, 1024, 2599, 40], dtype=dtype)
    pool_rows, start = torch.tensor([4, 0, 8, 2, 5]), torch.tensor([1, 1000, 0, 2600, 7])
    target = torch.tensor([0, 17, 3, 5, 100], dtype=dtype)
    ours, theirs, found = placed_twice(lengths, start, pool_rows, target if kept else None, longest=2599)
    assert torch.equal(found.own.view(5, WIDTH), ours.scratch[pool_rows, :WIDTH])
    assert torch.equal(found.prefix, lengths.long())
    for row, length in enumerate(found.lengths.tolist()):
        assert torch.equal(ours.virtual[row, :length], theirs.virtual[row, :length])
    assert (ours.virtual[len(lengths) * WIDTH :] == -1).all()
    for buffer, fresh in zip(ours.kv.buffers, Pools().kv.buffers, strict=True):
        source = ours.chosen[pool_rows] if kept else target.long()
        assert torch.equal(buffer[target.long()], fresh[source])


@pytest.mark.parametrize("kept", [True, False])
def test_candidates_are_placed_in_the_memory_of_a_graph(kept: bool) -> None:
    """Rows behind those given stand for nobody, whatever stood there; no request table is wanted."""
    lengths, pool_rows, start = torch.tensor([7, 2599, 30]), torch.tensor([4, 0, 8]), torch.tensor([1, 1000, 0])
    target = torch.tensor([3, 17, 5]) if kept else None
    _, _, found = placed_twice(lengths, start, pool_rows, target, room=5)
    assert found.prefix.tolist() == [7, 2599, 30, 0, 0]
    assert found.pool_rows.tolist() == [4, 0, 8, 0, 0]
    assert found.emitted.tolist() == [6, 1599, 30, 0, 0]
    assert found.own[3 * WIDTH :].tolist() == [0] * 2 * WIDTH
    assert found.lengths[3 * WIDTH :].tolist() == [1] * 2 * WIDTH


def test_the_last_choice_is_kept_by_itself() -> None:
    ours, theirs = Pools(), Pools()
    pool_rows, target = torch.tensor([4, 0, 8]), torch.tensor([0, 17, 3])
    keep_chosen(Keep(ours.kv, ours.chosen, target.int()), pool_rows)
    reference.keep_chosen(Keep(theirs.kv, theirs.chosen, target), pool_rows)
    assert all(torch.equal(a, b) for a, b in zip(ours.kv.buffers, theirs.kv.buffers, strict=True))
    assert not torch.equal(ours.kv.buffers[0], Pools().kv.buffers[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_that_are_kept_are_those_made_anew(dtype: torch.dtype) -> None:
    """Steps of the same batch, of fewer and more rows and candidates, and beyond the first size."""
    g = torch.Generator().manual_seed(1)
    pools, kept = Pools(), PrefixMasks(dtype)
    sizes = [(3, 4, 30), (3, 4, 31), (3, 4, 32), (2, 2, 200), (3, 4, 5), (4, 4, 260), (1, 6, 270), (4, 1, 9)]
    for rows_now, width, longest in sizes:
        lengths = torch.randint(1, longest + 1, (rows_now,), generator=g, dtype=torch.int32)
        lengths[0] = longest
        pool_rows = torch.randperm(POOL, generator=g)[:rows_now]
        own = pools.scratch[pool_rows, :width]
        found = share_prefix(lengths, pool_rows, own, pools.requests, longest, kept)
        anew = PrefixMasks(dtype)
        anew.fit(rows_now, width, longest)
        wanted = reference.share_prefix(lengths.long(), pool_rows, own, pools.requests, longest, anew)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b), (rows_now, width, longest)
        for row, length in enumerate(lengths.tolist()):
            assert found.mask.shape == (rows_now, 1, width, width + longest)
            assert (found.mask[row, 0] == 0).sum() == width * (1 + length)


def test_extent() -> None:
    log_p = torch.full((3, 5), -torch.inf)
    ids, stops = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.bool)
    for where, wanted in (((), (0, 0)), ((0, 0), (1, 1)), ((2, 3), (4, 2)), ((1, 4), (5, 3))):
        if where:
            log_p[where] = -1.0
        candidates = Candidates(ids, log_p.clone(), stops)
        assert extent(candidates) == reference.extent(candidates) == wanted


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [True, False])
@pytest.mark.parametrize("remembered", [True, False])
def test_a_draw_is_written(logits_dtype: torch.dtype, part: bool, remembered: bool) -> None:
    count, vocabulary = 6, 9001
    batch = rows.mixed(rows.MODELS[1], count, slots=6, seed=3)
    batch.candidates.token_ids.remainder_(vocabulary)
    batch.candidates.token_ids[0, -1] = 0
    batch.candidates.token_ids[1, :] = torch.tensor([0, 9000, 4096, 5, 0, 0])
    index = torch.tensor([7, 0, 3, 1, 2, 6])
    pool_rows, scratch = torch.tensor([3, 1, 4, 0, 5, 9]), torch.arange(100, 148).view(6, 8)
    logits, chosen = torch.randn(8 if part else 6, vocabulary).to(logits_dtype), torch.full((10,), -1)
    before = logits.clone()
    logits[index[0] if part else 0, 44] = torch.nan
    into = DrawBuffers(logits, index if part else None, chosen if remembered else None, pool_rows, scratch)
    sample = batch.run(tilt_sample, into=into)
    assert torch.equal(sample.token_id, batch.run(tilt_sample).token_id)
    drawn = index if part else torch.arange(6)
    want = torch.full((count, vocabulary), -torch.inf, dtype=logits_dtype)
    assert torch.equal(logits[drawn], want.scatter_(1, sample.token_id[:, None], 0.0))
    rest = [row for row in range(len(logits)) if row not in drawn.tolist()]
    assert torch.equal(logits[rest], before[rest])
    if remembered:
        assert torch.equal(chosen[pool_rows], scratch[torch.arange(6), sample.slot])
    assert (chosen >= 0).sum() == (6 if remembered else 0)
    results = torch.full((WORDS, count), -7)
    moved = batch.run(tilt_sample, into=into._replace(results=results))
    for a, b, c in zip(sample, moved, TiltSample.in_memory(moved.log_p, results), strict=True):
        assert a is not None and b is not None and c is not None
        assert b.data_ptr() == c.data_ptr()
        assert torch.equal(a, b)
    noted, untouched = torch.full_like(chosen, -1), logits.clone()
    batch.run(tilt_sample, into=into._replace(logits=None, chosen=noted if remembered else None))
    assert torch.equal(noted, chosen)
    assert torch.equal(logits, untouched)


def test_rows_are_ruled_by_rows_of_a_table() -> None:
    """Of the host's request pool, where a graph reads them; how many tokens a row has emitted it is told."""
    batch = rows.mixed(rows.MODELS[2], 24, slots=6, seed=5)
    ruled_by = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:24]

    def table(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """In a column of a wider one."""
        wide = torch.full((40, 3), 99, dtype=dtype)
        wide[ruled_by, 1] = values.to(dtype)
        return wide[:, 1]

    g = batch.guidance
    rules = {f.name: table(getattr(g, f.name), getattr(g, f.name).dtype) for f in fields(g) if f.name != "strict"}
    rules |= {"strict": table(g.strict, torch.int64), "emitted": g.emitted}
    other = replace(
        batch,
        guidance=GuidanceRows(**rules),
        seed=table(batch.seed, torch.int64),
        greedy=table(batch.greedy, torch.int64),
    )
    found, wanted = other.run(tilt_sample, ruled_by=ruled_by), batch.run(tilt_sample)
    for a, b in zip(found, wanted, strict=True):
        assert a is not None and b is not None
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_candidates_are_cut_into_memory() -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 300, generator=g) * 3
    ones = torch.ones(5)
    sampling = SamplingRows(ones, torch.tensor([3, 300, 300, 7, 1]), ones * 0.9, ones * 0)
    stops = torch.tensor([[4, 9]]).repeat(5, 1)
    wanted = build_candidates(logits, sampling, stops, 6, None, 300)
    memory = (torch.full((7, 6), 99), torch.full((7, 6), 99.0), torch.ones(7, 6, dtype=torch.bool))
    into = Candidates(*(t[:5] for t in memory))
    assert into.kept.all()
    found = build_candidates(logits, sampling, stops, 6, None, 300, into)
    for f, here in zip(fields(Candidates), memory, strict=True):
        assert getattr(found, f.name).data_ptr() == here.data_ptr()
        assert torch.equal(here[:5], getattr(wanted, f.name))
    assert memory[0][5:].eq(99).all()
    assert torch.equal(found.kept, wanted.kept)
