"""Compile gate: every kernel compiles for the GPUs of three generations and keeps to its registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_spills(capability: int, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # compile, whatever an earlier run left behind
    command = [sys.executable, "-m", "tests.kernels.compile_kernels", str(capability)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == (7 if capability == 90 else 5)
    for kernel in found:
        assert kernel["target"].startswith(f"sm_{capability}"), kernel
        assert kernel["stack"] == kernel["local"] == 0, f"registers spill: {kernel}"
        assert kernel["reg"] <= 255, kernel
