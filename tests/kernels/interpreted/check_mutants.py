"""The tests see planted bugs: each change of one line of the kernels is caught by what `check_tilt` compares."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lenvm_kernels
from lenvm.guidance import Control, Mode
from tests.kernels.interpreted import quick, rows

assert quick
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

TIE = 1.25
"""The value of every candidate in the rows of ties."""


def load(name: str, text: str, folder: Path) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def batch() -> rows.Batch:
    """One row of each kind that a mutant concerns."""
    wide = rows.mixed(rows.MODELS[1], 400, slots=6, seed=4)
    g = wide.guidance
    chosen: list[int] = []
    for control in Control:
        for mode in Mode:
            for past in (False, True):
                kind = (g.control == control) & (g.mode == mode) & ((g.left < 0) == past)
                kind &= wide.candidates.kept.sum(-1) > 2
                chosen += kind.nonzero().flatten()[:1].tolist()
    tied = (g.control == Control.HARD) & (g.mode == Mode.AT_MOST) & (wide.candidates.kept.sum(-1) > 2)
    chosen += tied.nonzero().flatten()[:2].tolist()
    tolerant = (g.control == Control.POSTERIOR) & (g.tolerance > 0) & (g.left > 3)
    chosen += tolerant.nonzero().flatten()[:2].tolist()
    out = wide.select(torch.tensor(chosen))
    # ties that the rounding of the generator leaves to chance
    hard = (out.guidance.control == Control.HARD).nonzero().flatten()
    out.scores.z[hard[-2:]] = TIE
    out.candidates.log_p[hard[-2:]] = torch.tensor(1 / 6).log()
    out.candidates.is_stop[hard[-2:]] = False
    return out


@pytest.fixture(scope="module")
def truths(batch: rows.Batch) -> list[rows.Truth]:
    pmf = rows.pmf_of(batch.lenvm)
    return [rows.truth(batch, r, pmf) for r in range(len(batch.seed))]


def wrong(batch: rows.Batch, truths: list[rows.Truth], module: ModuleType) -> bool:
    """Whether the comparisons of `check_tilt` find something; the rows a few at a time, because one is enough."""
    count = len(truths)
    for start in range(0, count, 6):
        index = torch.arange(start, min(start + 6, count))
        part = batch.select(index)
        got = part.run(module.tilt_sample, present=None)
        if rows.problems(part, got, [truths[i] for i in index.tolist()]):
            return True
        ties = torch.tensor([bool((part.scores.z[r] == TIE).all()) for r in range(len(index))])
        if not torch.equal(part.candidates.token_ids.amin(-1)[ties], got.token_id[ties]):
            return True
    return False


def test_the_kernel_itself_passes(batch: rows.Batch, truths: list[rows.Truth], tmp_path: Path) -> None:
    assert not wrong(batch, truths, load("sound_tilt", (SOURCES / "tilt.py").read_text(), tmp_path))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, batch: rows.Batch, truths: list[rows.Truth], tmp_path: Path) -> None:
    module, old, new = MUTANTS[name]
    text = (SOURCES / f"{module}.py").read_text()
    assert text.count(old) == 1, f"the kernel changed: {old!r} occurs {text.count(old)} times"
    label = "mutant_" + "".join(c if c.isalnum() else "_" for c in name)
    mutated = text.replace(old, new)
    if module == "common":
        load(f"{label}_common", mutated, tmp_path)
        mutated = (SOURCES / "tilt.py").read_text().replace("lenvm_kernels.fused.common", f"{label}_common")
    assert wrong(batch, truths, load(label, mutated, tmp_path))
