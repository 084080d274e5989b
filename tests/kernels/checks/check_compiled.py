"""The kernels of a CPU at the edges of the cut, and planted bugs. The rest of what is asked of them is in `check_tilt`,
`check_properties` and `check_parts`, as of Triton's; `test_compiled` says which."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lenvm_kernels
from lenvm.candidates import SamplingRows
from lenvm_kernels import build_candidates, reference
from tests.core.test_candidates import settings_of
from tests.kernels.checks import rows
from tests.kernels.checks.check_parts import as_dict
from tests.kernels.checks.planted import batch, load, mutant, truths_of, wrong

assert batch  # a fixture
SOURCES = Path(lenvm_kernels.__file__).parent / "compiled"
INF, NAN = math.inf, math.nan
MUTANTS = {
    "sign of the bias": ("tilt", "biases[r] * u[k]", "-biases[r] * u[k]"),
    "target off by one": ("tilt", "targets[r] - emitted[r] - 1", "targets[r] - emitted[r]"),
    "stop tokens scored": ("tilt", "kept[k] and not stops[r, k]", "kept[k]"),
    "at_most for at_least": ("tilt", "if mode == _AT_MOST:\n            cost = -", "if mode == _AT_LEAST:\n            cost = -"),  # noqa: E501
    "no sharpness": ("tilt", "sharpness[r] * log(weight", "log(weight"),
    "a bin left out": ("tilt", "for b in range(len(q)):", "for b in range(len(q) - 1):"),
    "kernel of another target": ("tilt", "max(left + 1, 0)", "max(left, 0)"),
    "soft without its bound": ("tilt", "return 0.0\n", "pass\n"),
    "bisection the wrong way": ("tilt", "expectation(log_p, u, middle) < wanted", "expectation(log_p, u, middle) > wanted"),  # noqa: E501
    "unsteered rows renormalised": ("tilt", "log_guided if steered else log_p[r, k]", "log_guided"),
    "ties to the higher id": ("tilt", "raw[best] and token[k] < token[best]", "raw[best] and token[k] > token[best]"),
    "noise of the slot": ("tilt", "keyed_gumbel(key, tokens[r, k])", "keyed_gumbel(key, k)"),
    "greedy rows sampled": ("tilt", "if not greedy[r]:", "if True:"),
    "KL the wrong way": ("tilt", "p * (log_guided - base[k])", "p * (base[k] - log_guided)"),
    "value of another slot": ("tilt", "statistics[VALUE, r] = -u[best]", "statistics[VALUE, r] = -u[0]"),
    "hash misses a step": ("common", "x = (x ^ (x >> _27)) * _MIX_B", "x = x * _MIX_B"),
    "position left out": ("common", " ^ np.uint64(position))", ")"),
}  # fmt: skip


def cut(logits: list[float], *given: float) -> dict[int, float]:
    """Three candidates of a row with stop tokens 1 and 3; also without the filters, where there are none."""
    settings = settings_of([given or (1.0, 99, 1.0, 0.0)])
    results = [
        as_dict(build_candidates(torch.tensor([logits]), s, torch.tensor([[1, 3]]), 3, reach=len(logits)), 0)
        for s in (settings, *([] if given else [replace(settings, unfiltered=True)]))
    ]
    assert all(r == pytest.approx(results[0]) and list(r) == list(results[0]) for r in results)
    return results[0]


def test_edges_of_the_cut() -> None:
    no = -INF
    assert list(cut([0.0] * 5)) == [0, 1, 2]  # ties to the lower id
    assert list(cut([NAN, 1.0, 0.0, no, no])) == [1, 2]  # NaN is impossible
    assert list(cut([INF, 1.0, 0.0, no, no])) == [0]
    assert cut([no] * 5) == cut([NAN] * 5) == {}
    assert list(cut([NAN, 1.0, 0.0, no, no], 1.0, 99, 0.9, 0.0)) == [1, 2]
    assert list(cut([-0.0, 0.0, no, no, no])) == [0, 1]
    assert list(cut([0.0, 5.0, 4.0, 1.0, no], 1.0, 1, 1.0, 0.0)) == [1]  # top-k
    assert list(cut([0.0, 5.0, 4.0, 1.0, no], 1.0, 99, 0.01, 0.0)) == [1]  # top-p keeps the first
    assert list(cut([0.0, 5.0, 4.0, 1.0, no], 1.0, 99, 1.0, 1.0)) == [1]  # min-p
    assert cut([2.0, no, 0.0, no, no], 2.0, 99, 1.0, 0.0)[0] == pytest.approx(1 / (1 + math.exp(-1)))


def test_the_cut_agrees_with_the_reference() -> None:
    """Filters of every kind together, some of them off, over a vocabulary that top-p has to sum."""
    g = torch.Generator().manual_seed(4)
    count, vocabulary = 60, 3001
    logits = torch.randn(count, vocabulary, generator=g) * 3
    stops = logits.argsort(-1, descending=True)[:, 1:3]
    sampling = SamplingRows(
        torch.rand(count, generator=g) + 0.3,
        torch.tensor([5, 40, vocabulary]).repeat(20),
        torch.tensor([0.4, 0.9, 1.0, 1.0]).repeat(15),
        torch.tensor([0.0, 0.02]).repeat(30),
    )
    got = build_candidates(logits, sampling, stops, 16, reach=40)
    want = reference.build_candidates(logits, sampling, stops, 16, None, 40)
    for r in range(count):
        have, wanted = as_dict(got, r), as_dict(want, r)
        assert list(have) == list(wanted), r
        assert list(have.values()) == pytest.approx(list(wanted.values()), rel=1e-4)
        assert torch.equal(got.is_stop[r][got.kept[r]], want.is_stop[r][want.kept[r]])


@pytest.fixture(scope="module")
def batches(batch: rows.Batch) -> list[tuple[rows.Batch, list[rows.Truth]]]:
    """As it is, and without tolerances: then the kernels over lengths come from a table."""
    tolerance = torch.zeros_like(batch.guidance.tolerance)
    exact = replace(batch, guidance=replace(batch.guidance, tolerance=tolerance))
    return [(b, truths_of(b)) for b in (batch, exact)]


def test_the_kernel_itself_passes(batches: list[tuple[rows.Batch, list[rows.Truth]]], tmp_path: Path) -> None:
    sound = load("sound_compiled", (SOURCES / "tilt.py").read_text(), tmp_path)
    assert not any(wrong(*one, sound) for one in batches)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, batches: list[tuple[rows.Batch, list[rows.Truth]]], tmp_path: Path) -> None:
    planted = mutant(SOURCES, name, MUTANTS[name], tmp_path)
    assert any(wrong(*one, planted) for one in batches)
