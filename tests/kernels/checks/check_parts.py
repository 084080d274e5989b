"""`build_candidates` and `value_head` against their references."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from lenvm.candidates import Candidates, SamplingRows
from lenvm.guidance import Control, GuidanceRows, Mode
from lenvm.heads import ValueHead
from lenvm_kernels import build_candidates, reference, value_head
from tests.core import test_candidates as core_tests
from tests.kernels.checks import quick

assert quick
INF, NAN = math.inf, math.nan


def as_dict(candidates: Candidates, row: int) -> dict[int, float]:
    kept = candidates.kept[row]
    return dict(zip(candidates.token_ids[row][kept].tolist(), candidates.log_p[row][kept].exp().tolist(), strict=True))


def test_against_float64_row_by_row() -> None:
    rng = random.Random(3)
    vocabulary = core_tests.VOCABULARY
    given, logits = [], []
    for _ in range(48):
        given.append(
            (
                rng.choice([0.5, 1.0, 1.7]),
                rng.choice([1, 5, 20, vocabulary]),
                rng.choice([0.3, 0.9, 1.0]),
                rng.choice([0.0, 0.05, 0.5]),
            )
        )
        logits.append([rng.gauss(0, 2) if rng.random() < 0.8 else -INF for _ in range(vocabulary)])
        logits[-1][rng.randrange(vocabulary)] = 0.0
    stops = torch.tensor([[2, -1]]).expand(48, -1)
    got = build_candidates(torch.tensor(logits), core_tests.settings_of(given), stops, 8, reach=20)
    for r, row in enumerate(given):
        want = core_tests.reference(logits[r], *row, 8)
        have = as_dict(got, r)
        assert list(have) == list(want)
        assert list(have.values()) == pytest.approx(list(want.values()), rel=1e-5)
        kept = got.kept[r]
        assert got.is_stop[r][kept].tolist() == [i == 2 for i in have]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strict_bounds_and_a_vocabulary_of_several_chunks(dtype: torch.dtype) -> None:
    """The core decides, in the same mixed batch: strict rows before, at and past their bound."""
    g = torch.Generator().manual_seed(1)
    count, vocabulary = 12, 9001
    logits = (torch.randn(count, vocabulary, generator=g) * 3).to(dtype)
    stops = torch.randint(0, vocabulary, (count, 3), generator=g)
    stops[::3, 1] = -1
    stops[1::3, 2] = stops[1::3, 0]  # named twice
    logits.scatter_(1, stops.clamp(min=0), 9.0)
    sampling = SamplingRows(
        torch.rand(count, generator=g) + 0.3,
        torch.tensor([5, 40, vocabulary]).repeat(4),
        torch.tensor([0.4, 0.9, 1.0, 1.0]).repeat(3),
        torch.tensor([0.0, 0.02]).repeat(6),
    )
    guidance = GuidanceRows(
        mode=torch.arange(count) % 3, control=torch.arange(count) % 5, target=torch.full((count,), 6),
        emitted=torch.arange(count) % 4 + 3, sharpness=torch.ones(count), tolerance=torch.zeros(count),
        strict=torch.arange(count) % 7 > 0, bias=torch.zeros(count),
    )  # fmt: skip
    for bounds in (guidance, None) if dtype == torch.float32 else (guidance,):
        got = build_candidates(logits, sampling, stops, 16, bounds, reach=40)
        want = reference.build_candidates(logits, sampling, stops, 16, bounds, 40)
        for r in range(count):
            have, wanted = as_dict(got, r), as_dict(want, r)
            assert list(have) == list(wanted), r
            assert list(have.values()) == pytest.approx(list(wanted.values()), rel=1e-4)
            assert torch.equal(got.is_stop[r][got.kept[r]], want.is_stop[r][want.kept[r]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_lowest_ids_whatever_else_is_in_the_batch(dtype: torch.dtype) -> None:
    """Equal ones at the end of what is ordered: a row alone, among others of other settings, and as the core has it."""
    g = torch.Generator().manual_seed(5)
    count, vocabulary = 8, 9001
    logits = (torch.randn(count, vocabulary, generator=g) * 1.5).round().to(dtype)
    logits[1] = 0.0
    logits[2, 7:] = -INF
    logits[3, ::2] = -0.0
    stops = torch.randint(0, vocabulary, (count, 2), generator=g)
    sampling = core_tests.settings_of([(1.0, vocabulary, 1.0, 0.0), (0.7, 3, 0.9, 0.0)] * (count // 2))
    strict = torch.tensor([False, True] * (count // 2))
    guidance = GuidanceRows(
        mode=torch.zeros(count, dtype=torch.int64), control=torch.ones(count, dtype=torch.int64),
        target=torch.full((count,), 6), emitted=torch.arange(count), sharpness=torch.ones(count),
        tolerance=torch.zeros(count), strict=strict, bias=torch.zeros(count),
    )  # fmt: skip
    got = build_candidates(logits, replace(sampling, no_whole_top_p=True), stops, 16, guidance, reach=16)
    want = reference.build_candidates(logits, sampling, stops, 16, guidance, None)
    for r in range(count):
        row = slice(r, r + 1)
        settings = core_tests.settings_of([(0.7, 3, 0.9, 0.0)] if r % 2 else [(1.0, vocabulary, 1.0, 0.0)])
        bounds = guidance.select(torch.tensor([r])) if r % 2 else None
        alone = build_candidates(logits[row], settings, stops[row], 16, bounds, reach=16)
        wide = build_candidates(logits[row], settings, stops[row], 16, bounds, reach=100)
        for found in (alone, wide):
            assert as_dict(found, 0) == pytest.approx(as_dict(want, r), rel=1e-5), r
            assert list(as_dict(found, 0)) == list(as_dict(got, r)) == list(as_dict(want, r)), r


def test_a_filter_that_is_off_takes_nothing_whatever_the_others_have() -> None:
    """Also where the probabilities before a token already round to all of them."""
    logits = torch.randn(40, 3001, generator=torch.Generator().manual_seed(6)) * 6
    settings = core_tests.settings_of([(1.0, 3001, 0.95, 0.0), (1.0, 40, 0.95, 0.1)] + [(1.0, 3001, 1.0, 0.0)] * 38)
    stops = torch.full((40, 1), 2)
    got = build_candidates(logits, settings, stops, 32, reach=40)
    free = build_candidates(logits, replace(settings, unfiltered=True), stops, 32, reach=32)
    assert torch.equal(got.token_ids[2:], free.token_ids[2:])
    assert got.kept[2:].all()
    torch.testing.assert_close(got.log_p[2:], free.log_p[2:], rtol=1e-5, atol=1e-4)


def cut(logits: list[float], strict: bool = False, mode: Mode = Mode.EQUAL_TO, left: int = 1) -> dict[int, float]:
    one = torch.tensor([1])
    guidance = GuidanceRows(
        mode=one * int(mode), control=one * int(Control.POSTERIOR), target=one * (left + 1), emitted=one * 0,
        sharpness=one.float(), tolerance=one * 0.0, strict=torch.tensor([strict]), bias=one * 0.0,
    )  # fmt: skip
    filtered = core_tests.settings_of([(1.0, 99, 1.0, 0.0)])
    results = [
        as_dict(build_candidates(torch.tensor([logits]), settings, torch.tensor([[1, 3]]), 3, guidance, reach=3), 0)
        for settings in (filtered, replace(filtered, no_whole_top_p=True), replace(filtered, unfiltered=True))
    ]
    assert results[0] == results[1] == results[2]
    return results[0]


def test_edges_of_strict_bounds() -> None:
    no = -INF
    assert list(cut([1.0, 5.0, 0.5, 4.0, 0.2], strict=True)) == [0, 2, 4]
    assert list(cut([1.0, 5.0, 0.5, 4.0, 0.2], strict=True, left=0)) == [1, 3]
    assert list(cut([9.0, -50.0, 8.0, -60.0, 7.0], strict=True, left=0)) == [1, 3]  # outside the top-k
    assert list(cut([no, 1.0, no, no, no], strict=True)) == [1]  # a ban that cannot hold
    assert list(cut([1.0, no, 0.0, no, no], strict=True, left=0)) == [0, 2]  # a force that cannot
    assert list(cut([1.0, 5.0, 0.5, 4.0, 0.2], strict=True, mode=Mode.AT_MOST)) == [1, 3, 0]


def test_edges_of_the_cut() -> None:
    no = -INF
    assert list(cut([0.0] * 5)) == [0, 1, 2]  # ties to the lower id
    assert list(cut([NAN, 1.0, 0.0, no, no])) == [1, 2]  # NaN is impossible
    assert cut([no] * 5) == {}
    assert list(cut([INF, 1.0, 0.0, no, no])) == [0]
    assert list(cut([-0.0, 0.0, no, no, no])) == [0, 1]


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_value_head_against_float64(hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    for shape, features in (((1,), 16), ((5, 13), 100), ((3,), 130)):
        head = ValueHead(features)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=g)
        head = head.to(weight_dtype)
        hidden = torch.randn(*shape, features, generator=g).to(hidden_dtype)
        with torch.no_grad():
            got = value_head(hidden, head)
            x = hidden.double()
            inner = torch.nn.functional.silu(x @ head.w1.double().T + head.b1.double())
            want = (inner @ head.w2.double().T + head.b2.double()).squeeze(-1)
        assert got.shape == shape
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=2e-5)


def test_a_row_of_the_value_head_does_not_depend_on_its_batch() -> None:
    head = ValueHead(70)
    head.reset_parameters(0.2)
    hidden = torch.randn(70, 70, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(value_head(hidden, head)[66:68], value_head(hidden[66:68], head))


def test_the_value_head_is_differentiable_where_asked() -> None:
    head = ValueHead(8)
    head.reset_parameters(0.2)
    value_head(torch.randn(2, 8), head).sum().backward()
    assert head.w1.grad is not None
