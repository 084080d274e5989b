"""The benchmarks run end to end without a GPU, and a guided step does what it must by count."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sglang.conftest import ROOT, environment

pytestmark = pytest.mark.slow


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_gpu_script_runs_dry_and_a_step_never_waits(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--dry", "--out", str(tmp_path)]
    compiling = environment(TORCHDYNAMO_DISABLE="0")  # torch.compile is one of those that are timed
    done = subprocess.run(command, cwd=ROOT, env=compiling, capture_output=True, text=True, check=False)
    logs = "\n".join(f"{p.name}: {p.read_text(errors='replace')[-1500:]}" for p in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    for name in ("kernels", "attention", "value_step", "serve_overhead", "scaling"):
        rows = rows_of(tmp_path / f"{name}.csv")
        assert rows and all(float(r["p20"]) <= float(r["p80"]) for r in rows), name

    # The path that a GPU takes, on the CPU: every candidate fed, nothing asked of the device.
    for provider in ("ours, device path", "ours, device path, graphs"):
        counted = [r for r in rows_of(tmp_path / "value_step.csv") if r["provider"] == provider]
        found = {(r["sizes"].split(maxsplit=3)[-1], r["name"]): float(r["p50"]) for r in counted}
        for kind, tokens in (("posterior", 16), ("posterior top-k 4", 4), ("bias", 16), ("values", 1)):
            assert found[kind, "waits of ours"] == 0, kind
            assert found[kind, "value forwards"] == 1, kind
            assert found[kind, "value tokens per row"] == tokens, kind
        # a batch that is guided throughout needs no draw of the host's
        drawn = "launches of the host's sampler"
        assert found["posterior", drawn] == found["bias", drawn] == 0 < found["values", drawn]
        # where candidates stand and the last one's KV; top-k; the cut; and rule, draw and what is written of it, or,
        # where a graph does that, a copy of what it drew
        for kind in ("posterior", "posterior top-k 4", "bias"):
            assert found[kind, "launches of ours outside the value forward"] == 4, kind
