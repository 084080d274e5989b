"""Planted bugs: load a changed kernel, and see whether the comparisons of `check_tilt` find something."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lenvm.guidance import Control, Mode
from tests.kernels.checks import quick, rows

assert quick
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


def truths_of(batch: rows.Batch) -> list[rows.Truth]:
    pmf = rows.pmf_of(batch.lenvm)
    return [rows.truth(batch, r, pmf) for r in range(len(batch.seed))]


@pytest.fixture(scope="module")
def truths(batch: rows.Batch) -> list[rows.Truth]:
    return truths_of(batch)


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


def mutant(sources: Path, name: str, change: tuple[str, str, str], folder: Path) -> ModuleType:
    """The `tilt` of a folder of kernels with one line of it, or of the `common` beside it, changed."""
    module, old, new = change
    text = (sources / f"{module}.py").read_text()
    assert text.count(old) == 1, f"the kernel changed: {old!r} occurs {text.count(old)} times"
    label = "mutant_" + "".join(c if c.isalnum() else "_" for c in name)
    mutated = text.replace(old, new)
    if module == "common":
        load(f"{label}_common", mutated, folder)
        mutated = (sources / "tilt.py").read_text().replace(f"lenvm_kernels.{sources.name}.common", f"{label}_common")
    return load(label, mutated, folder)
