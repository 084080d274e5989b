"""The tests see planted bugs: each change of one line of the kernels is caught by what `check_tilt` compares."""

from __future__ import annotations

from pathlib import Path

import pytest

import lenvm_kernels
from tests.kernels.checks import quick, rows
from tests.kernels.checks.planted import batch, load, mutant, truths, wrong

assert quick and batch and truths  # fixtures
SOURCES = Path(lenvm_kernels.__file__).parent / "fused"
MUTANTS = {
    "sign of the bias": ("tilt", "bias_row).to(tl.float64) * u", "bias_row).to(tl.float64) * -u"),
    "target off by one": ("tilt", "target_row) - emitted - 1", "target_row) - emitted"),
    "stop tokens scored": ("tilt", "scored = kept & ~stop", "scored = kept"),
    "at_most for at_least": ("tilt", "tl.where(mode == _AT_MOST, -one", "tl.where(mode == _AT_LEAST, -one"),
    "no sharpness": ("tilt", "base + sharpness * tl.log(weight", "base + tl.log(weight"),
    "overrun ignored": ("tilt", "tl.where(past, _OVERRUN, ", "tl.where(left > 10**9, _OVERRUN, "),
    "triangle without its far side": ("tilt", "fall_to * (2.0 * e - fall_to - 1.0) / (2.0 * e)", "0.0 * fall_to"),
    "bins not normalised": ("tilt", "tl.maximum(total, 0.0) / norm", "tl.maximum(total, 0.0)"),
    "soft without its bound": ("tilt", "return tl.where(satisfied, 0.0, beta)", "return beta"),
    "bisection the wrong way": ("tilt", "tl.sum(w * u, 0) < wanted", "tl.sum(w * u, 0) > wanted"),
    "unsteered rows renormalised": ("tilt", "tl.float32), raw)", "tl.float32), guided.to(tl.float32))"),
    "ties to the higher id": ("tilt", "(token == tl.min(tl.where(best, token, NO_TOKEN), 0))", "(token == tl.max(tl.where(best, token, 0), 0))"),  # noqa: E501
    "noise of the slot": ("tilt", "seed_row), emitted, token)", "seed_row), emitted, k.to(tl.int64))"),
    "greedy rows sampled": ("tilt", "greedy_row) == 0", "greedy_row) >= 0"),
    "KL the wrong way": ("tilt", "p * (guided - base)", "tl.exp(base) * (base - guided)"),
    "hash misses a step": ("common", "x = (x ^ (x >> 27)) * _MIX_B", "x = x * _MIX_B"),
    "position left out": ("common", ") ^ position.to(tl.uint64))", "))"),
}  # fmt: skip


def test_the_kernel_itself_passes(batch: rows.Batch, truths: list[rows.Truth], tmp_path: Path) -> None:
    assert not wrong(batch, truths, load("sound_tilt", (SOURCES / "tilt.py").read_text(), tmp_path))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, batch: rows.Batch, truths: list[rows.Truth], tmp_path: Path) -> None:
    assert wrong(batch, truths, mutant(SOURCES, name, MUTANTS[name], tmp_path))
