#!/usr/bin/env python3
"""What `make test`, `make test-fast` and `make lint` run: linters, then the tests of each environment.

Every folder of `tests/` belongs to one environment or both (SUITES); a folder that belongs to none is an error, so no
test is left out by accident, and an environment in which no test ran has failed. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SUITES = {
    "train": ("env", "core", "lf", "demo"),
    "serve": ("env", "eval", "report", "sampling", "pipeline", "kernels", "sglang", "e2e"),
}
# The core is tested in full under the older transformers (train), and what depends on transformers under the newer too.
SERVE_ALSO = ("tests/core/test_modeling.py",)
LINTERS = {
    "ruff check": ("-m", "ruff", "check", "."),
    "ruff format": ("-m", "ruff", "format", "--check", "."),
    "mypy": ("-m", "mypy"),
}
NO_TESTS_COLLECTED = 5  # pytest's exit status


class Result(NamedTuple):
    """Outcome of one linter or one suite."""

    name: str
    passed: bool
    seconds: float
    detail: str


def environments_home() -> Path:
    return Path(os.environ.get("LENVM_ENVS") or ROOT / ".envs").expanduser().resolve()


def unassigned_folders(tests: Path) -> list[str]:
    """Folders of tests/ with test files in them that no suite names."""
    known = {folder for folders in SUITES.values() for folder in folders}
    return sorted({p.relative_to(tests).parts[0] for p in tests.rglob("test_*.py")} - known)


def suite_paths(name: str) -> list[str]:
    """What pytest is given in one environment: the folders and files that exist."""
    paths = [f"tests/{folder}" for folder in SUITES[name]] + (list(SERVE_ALSO) if name == "serve" else [])
    return [path for path in paths if (ROOT / path).exists()]


def run(python: Path, arguments: list[str]) -> tuple[int, float]:
    """Run the interpreter of an environment in the checkout, its output going to ours. Returns (status, seconds)."""
    environment = dict(os.environ)
    # Tiny models gain nothing from threads, and two busy pools on few cores lose a lot.
    environment.setdefault("OMP_NUM_THREADS", "1")
    began = time.monotonic()
    status = subprocess.run([str(python), *arguments], cwd=ROOT, env=environment, check=False).returncode
    return status, time.monotonic() - began


def lint() -> list[Result]:
    results = []
    for name, arguments in LINTERS.items():
        print(f"\n== {name}", flush=True)
        status, seconds = run(environments_home() / "train" / "bin" / "python", list(arguments))
        results.append(Result(name, status == 0, seconds, "clean" if status == 0 else "see above"))
    return results


def counts(report: Path) -> dict[str, int]:
    """Numbers of tests, failures, errors and skips in a JUnit report; all 0 if pytest wrote none."""
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    if report.exists():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            for key in totals:
                totals[key] += int(suite.get(key, "0"))
    return totals


def run_suite(name: str, fast: bool) -> Result:
    """Run pytest in one environment."""
    paths = suite_paths(name)
    print(f"\n== tests, {name} environment: {' '.join(paths)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        arguments = ["-m", "pytest", "-q", f"--junitxml={report}", *paths]
        if fast:
            arguments += ["-m", "not slow"]
        status, seconds = run(environments_home() / name / "bin" / "python", arguments)
        n = counts(report)
    bad = n["failures"] + n["errors"]
    detail = f"{n['tests'] - bad - n['skipped']} passed, {bad} failed, {n['skipped']} skipped"
    if status == NO_TESTS_COLLECTED or n["tests"] == 0:
        detail = "no test ran"
    return Result(f"tests ({name})", status == 0 and n["tests"] > 0, seconds, detail)


def summary(results: list[Result]) -> str:
    lines = [f"  {'ok    ' if r.passed else 'FAILED'}  {r.name:<14} {r.seconds:6.0f} s   {r.detail}" for r in results]
    verdict = "all passed" if all(r.passed for r in results) else "FAILED"
    return "\n".join(["", *lines, f"{verdict} in {sum(r.seconds for r in results):.0f} s"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="leave out the tests marked slow (servers, trainings)")
    parser.add_argument("--only", choices=("lint", *SUITES), help="run one part")
    options = parser.parse_args(arguments)
    stray = unassigned_folders(ROOT / "tests")
    if stray:
        print(f"env/test.py: tests/{stray[0]} belongs to no environment; add it to SUITES", file=sys.stderr)
        return 2
    parts = [options.only] if options.only else ["lint", *SUITES]
    needed = {"train" if part == "lint" else part for part in parts}
    for name in sorted(needed):
        if not (environments_home() / name / "bin" / "python").exists():
            print(f"env/test.py: there is no {name} environment; build it with `make env-{name}`", file=sys.stderr)
            return 2
    results: list[Result] = []
    for part in parts:
        results += lint() if part == "lint" else [run_suite(part, options.fast)]
    print(summary(results), flush=True)
    return 0 if all(r.passed for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
