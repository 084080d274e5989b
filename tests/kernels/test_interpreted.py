"""The kernels in Triton's interpreter, in processes of their own: Triton reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKS = "tests/kernels/checks"


def run_checks(least: int, *arguments: str, **variables: str) -> None:
    """Run checks with further environment variables; at least so many must have passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed.group(1)) >= least, done.stdout[-2000:]


def test_ties_and_bad_scores() -> None:
    """For the inner loop; the others are below."""
    run_checks(2, f"{CHECKS}/check_tilt.py", "-k", "hard_ties or bad_length", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_all() -> None:
    """Against float64, properties, edges and planted bugs: one process, because each has to import Triton."""
    names = ("tilt", "properties", "parts", "step", "attend", "lookahead", "mutants")
    run_checks(116, *(f"{CHECKS}/check_{name}.py" for name in names), TRITON_INTERPRET="1")
