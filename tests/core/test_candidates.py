"""Candidate cut against a row-by-row reference."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from lenvm.candidates import Candidates, SamplingRows, build_candidates, keep_mass, most_likely, settle_sure_rows

VOCABULARY = 40


def reference(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, limit: int
) -> dict[int, float]:
    weights = [math.exp(x / temperature) if x > -math.inf else 0.0 for x in logits]
    total = sum(weights)
    ranked = sorted(((w / total, i) for i, w in enumerate(weights) if w > 0), key=lambda pair: (-pair[0], pair[1]))[
        :top_k
    ]
    mass = sum(p for p, _ in ranked)
    kept, before = [], 0.0
    for p, i in ranked:
        if before <= top_p * mass and p >= min_p * ranked[0][0]:
            kept.append((p, i))
        before += p
    kept = kept[:limit]
    mass = sum(p for p, _ in kept)
    return {i: p / mass for p, i in kept}


def settings_of(rows: list[tuple[float, int, float, float]]) -> SamplingRows:
    t, k, p, m = zip(*rows, strict=True)
    return SamplingRows(torch.tensor(t), torch.tensor(k), torch.tensor(p), torch.tensor(m))


@pytest.mark.parametrize("reach", [None, 20])
def test_against_the_reference(reach: int | None) -> None:
    rng = random.Random(3)
    rows, logits = [], []
    for _ in range(200):
        rows.append(
            (
                rng.choice([0.5, 1.0, 1.7]),
                rng.choice([1, 5, 20, VOCABULARY]),
                rng.choice([0.3, 0.9, 1.0]),
                rng.choice([0.0, 0.05, 0.5]),
            )
        )
        logits.append([rng.gauss(0, 2) if rng.random() < 0.8 else -math.inf for _ in range(VOCABULARY)])
        logits[-1][rng.randrange(VOCABULARY)] = 0.0
    got = build_candidates(
        torch.tensor(logits), settings_of(rows), torch.tensor([[2, -1]]).expand(200, -1), 8, reach=reach
    )
    for r, row in enumerate(rows):
        expected = reference(logits[r], *row, 8)
        kept = got.kept[r]
        assert got.token_ids[r][kept].tolist() == list(expected)
        assert got.log_p[r][kept].exp().tolist() == pytest.approx(list(expected.values()), rel=1e-4)
        assert got.is_stop[r].tolist() == [i == 2 for i in got.token_ids[r].tolist()]


def cut(logits: list[float], **bounds: bool) -> dict[int, float]:
    given = {name: torch.tensor([value]) for name, value in bounds.items()}
    out = build_candidates(
        torch.tensor([logits]), settings_of([(1.0, 99, 1.0, 0.0)]), torch.tensor([[1, 3]]), 3, **given
    )
    kept = out.kept[0]
    return dict(zip(out.token_ids[0][kept].tolist(), out.log_p[0][kept].exp().tolist(), strict=True))


def test_ties_go_to_the_lower_id() -> None:
    assert list(cut([0.0, 0.0, 0.0, 0.0, 0.0])) == [0, 1, 2]


def test_which_of_several_equal_tokens_get_in_is_said() -> None:
    """Whatever the device's top-k takes of them: forbidden tokens, rounded logits, both zeros."""
    g = torch.Generator().manual_seed(7)
    logits = (torch.randn(6, 500, generator=g) * 2).round()
    logits[1], logits[2, 9:], logits[3, ::2] = 0.0, -math.inf, -math.inf
    got = most_likely(logits, 20)
    for row, found in zip(logits.tolist(), got.tolist(), strict=True):
        possible = [i for i in sorted(range(500), key=lambda i: (-row[i], i))[:20] if row[i] > -math.inf]
        assert found[: len(possible)] == possible
    stops = torch.tensor([[2, 11]]).repeat(6, 1)
    off = settings_of([(0.7, 500, 1.0, 0.0)] * 6)
    for reach in (6, 9, 400):
        assert torch.equal(build_candidates(logits, off, stops, 6, reach=reach).token_ids, got[:, :6])


def test_banned_and_forced_stops() -> None:
    logits = [1.0, 5.0, 0.5, 4.0, 0.2]
    assert list(cut(logits, ban_stop=True)) == [0, 2, 4]
    assert list(cut(logits, force_stop=True)) == [1, 3]
    assert sum(cut(logits, force_stop=True).values()) == pytest.approx(1.0)


def test_grammar_comes_before_strict() -> None:
    """Only stop tokens allowed: a ban cannot hold. No stop token allowed: a force cannot."""
    no = -math.inf
    assert list(cut([no, 1.0, no, no, no], ban_stop=True)) == [1]
    assert list(cut([1.0, no, 0.0, no, no], force_stop=True)) == [0, 2]


def test_a_forced_stop_is_found_outside_the_top_k() -> None:
    logits = [9.0, -50.0, 8.0, -60.0, 7.0]
    assert list(cut(logits, force_stop=True)) == [1, 3]


def test_a_vocabulary_smaller_than_k() -> None:
    out = build_candidates(torch.zeros(1, 4), settings_of([(1.0, 99, 1.0, 0.0)]), torch.tensor([[-1]]), 16)
    assert out.token_ids.shape == (1, 4)
    assert not out.is_stop.any()


def test_unfiltered_rows_get_what_filters_that_are_off_leave() -> None:
    g = torch.Generator().manual_seed(3)
    logits = (torch.randn(20, 50, generator=g) * 3).round()  # ties
    logits[3, 4:] = -torch.inf
    logits[4] = -300.0
    logits[4, 7] = 0.0  # every other probability is 0 in float32
    logits[5, 0] = torch.nan
    off = settings_of([(0.7, 50, 1.0, 0.0)] * 20)
    stops = torch.tensor([[2, 11, -1]]).repeat(20, 1)
    want = build_candidates(logits, off, stops, 6, reach=9)
    found = build_candidates(logits, replace(off, unfiltered=True), stops, 6, reach=9)
    assert torch.equal(found.token_ids, want.token_ids)
    assert torch.equal(found.is_stop, want.is_stop)
    assert torch.equal(found.log_p.nan_to_num(), want.log_p.nan_to_num())
    assert found.kept.sum(-1)[3:6].tolist() == [4, 1, 6]


def rows_of(probabilities: list[list[float]], stops: list[list[bool]]) -> Candidates:
    p = torch.tensor(probabilities)
    ids = torch.arange(p.shape[1]).expand_as(p)
    return Candidates(ids, (p / p.sum(-1, keepdim=True)).log(), torch.tensor(stops))


def test_keep_mass_keeps_the_smallest_set_and_the_stop_tokens() -> None:
    candidates = rows_of([[0.6, 0.3, 0.07, 0.03], [0.99, 0.01, 0.0, 0.0]], [[False] * 3 + [True], [False] * 4])
    for mass, kept in (
        (1.0, [[0, 1, 2, 3], [0, 1]]),
        (0.95, [[0, 1, 2, 3], [0]]),
        (0.9, [[0, 1, 3], [0]]),
        (0.5, [[0, 3], [0]]),
    ):
        out = keep_mass(candidates, mass)
        assert [row.nonzero()[:, 0].tolist() for row in out.kept] == kept
        assert torch.allclose(out.log_p.exp().sum(-1), torch.ones(2))
    assert torch.allclose(keep_mass(candidates, 0.5).log_p[0, [0, 3]].exp(), torch.tensor([0.6, 0.03]) / 0.63)


def test_settled_rows_keep_their_draw_only() -> None:
    candidates = rows_of([[0.9, 0.1, 0.0], [0.5, 0.3, 0.2]], [[False, True, False], [False] * 3])
    out = settle_sure_rows(candidates, torch.tensor([1, 2]), min_entropy=0.4)  # 0.325 and 1.03 nats
    assert [row.nonzero()[:, 0].tolist() for row in out.kept] == [[1], [0, 1, 2]]
    assert out.log_p[0, 1] == 0
    assert torch.allclose(out.log_p[1], candidates.log_p[1])
    same = settle_sure_rows(candidates, torch.tensor([1, 2]), min_entropy=0.0)
    assert torch.allclose(same.log_p, candidates.log_p)
