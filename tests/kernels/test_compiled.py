"""The kernels of a CPU: the same checks as of Triton's, once compiled, and planted bugs in plain Python."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.test_interpreted import CHECKS, ROOT, run_checks

NOWHERE = """
from numba.core import caching
caching.CacheImpl._locator_classes = []  # neither the package nor the user has a folder that can be written
from lenvm_kernels.compiled.common import compiled
add = compiled("i8(i8, i8)")(lambda a, b: a + b)
assert add(2, 3) == 5 and not add.stats.cache_path, add.stats
"""


def test_compiled() -> None:
    chosen = (
        "check_tilt or check_properties or check_step or (check_parts and not value_head) "
        "or (check_compiled and not mutant and not itself)"
    )
    files = (f"{CHECKS}/check_{name}.py" for name in ("tilt", "properties", "parts", "step", "compiled"))
    run_checks(38, *files, "-k", chosen)


def test_where_machine_code_cannot_be_kept_it_is_compiled_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", NOWHERE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_planted_bugs() -> None:
    """Not compiled: a mutant would take some seconds, and Python runs the same lines."""
    run_checks(18, f"{CHECKS}/check_compiled.py", "-k", "mutant or itself", NUMBA_DISABLE_JIT="1")


@pytest.mark.slow
def test_the_benchmark_compares_both_ways(tmp_path: Path) -> None:
    out = tmp_path / "kernels.csv"
    command = [sys.executable, "benchmarks/kernels.py", "--cpu", "--repeats", "5", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["provider"] for row in rows} == {"ours", "eager"}
    assert {row["name"].split()[0] for row in rows} == {"tilt_sample", "build_candidates"}
    assert all(float(row["p50"]) > 0 for row in rows)
