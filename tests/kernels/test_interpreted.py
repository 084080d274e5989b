"""The kernels in Triton's interpreter, in processes of their own: Triton reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_checks(name: str, least: int, *arguments: str) -> None:
    """Run one file of checks; at least so many must have passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    done = subprocess.run(
        [*command, f"tests/kernels/interpreted/{name}.py", *arguments],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed.group(1)) >= least, done.stdout[-2000:]


def test_edges() -> None:
    run_checks("check_tilt", 3, "-k", "edges and (POSTERIOR or SOFT) or hard_ties or bad_length")


@pytest.mark.slow
def test_tilt() -> None:
    run_checks("check_tilt", 16)


@pytest.mark.slow
def test_properties() -> None:
    run_checks("check_properties", 5)


@pytest.mark.slow
def test_candidates_and_value_head() -> None:
    run_checks("check_parts", 9)


@pytest.mark.slow
def test_planted_bugs_are_caught() -> None:
    run_checks("check_mutants", 18)
