"""Compile gate: every kernel compiles for the GPUs of three generations and keeps to its registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


KERNELS = {80: 20, 90: 22, 100: 20}
"""Compute capabilities and how many kernels are compiled for each."""


@pytest.mark.slow
def test_compiles_without_spills(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # compile, whatever an earlier run left behind
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", *map(str, KERNELS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for capability, count in KERNELS.items():
        assert sum(k["target"].startswith(f"sm_{capability}") for k in found) == count
    assert len(found) == sum(KERNELS.values())
    for kernel in found:
        assert kernel["stack"] == kernel["local"] == 0, f"registers spill: {kernel}"
        assert kernel["reg"] <= 255, kernel
