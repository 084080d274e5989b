"""The kernels of a CPU: the same checks as of Triton's, once compiled, and planted bugs in plain Python."""

from __future__ import annotations

import pytest

from tests.kernels.test_interpreted import CHECKS, run_checks

pytest.importorskip("numba")


def test_compiled() -> None:
    chosen = "check_tilt or check_properties or row_by_row or (check_compiled and not mutant and not itself)"
    files = (f"{CHECKS}/check_{name}.py" for name in ("tilt", "properties", "parts", "compiled"))
    run_checks(25, *files, "-k", chosen)


@pytest.mark.slow
def test_planted_bugs() -> None:
    """Not compiled: a mutant would take some seconds, and Python runs the same lines."""
    run_checks(18, f"{CHECKS}/check_compiled.py", "-k", "mutant or itself", NUMBA_DISABLE_JIT="1")
