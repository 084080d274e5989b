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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Suite(NamedTuple):
    """One run of pytest: in which environment, over which folders of `tests/` and which further files, and how nicely:
    suites that take turns with their servers are slow alone, so the others leave them the cores. With a marker, only
    tests that carry it."""

    environment: str
    folders: tuple[str, ...]
    files: tuple[str, ...] = ()
    nice: int = 0
    marker: str = ""

    @property
    def paths(self) -> list[str]:
        """What pytest is given."""
        return [f"tests/{folder}" for folder in self.folders] + list(self.files)


# They run side by side, _AT_ONCE of them.
SUITES = {
    "sglang": Suite("serve", ("sglang",)),
    "e2e": Suite("serve", ("e2e",), nice=2),
    "train": Suite("train", ("env", "core", "lf", "demo"), nice=4),
    # The core is tested in full under the older transformers (train), and what depends on it under the newer too.
    "serve": Suite(
        "serve",
        ("env", "eval", "report", "sampling", "pipeline", "kernels"),
        ("tests/core/test_modeling.py", "tests/core/test_convert.py"),
        nice=4,
    ),
    # What touches SGLang's private functions, under the oldest that is supported. Last: it has servers of its own, and
    # starts when another suite has ended its.
    "floor": Suite("serve-floor", ("sglang",), nice=2, marker="floor"),
}
# All but that, also on two cores: each waits for servers and single processes a good part of its time.
_AT_ONCE = len(SUITES) - 1 if (os.cpu_count() or 1) > 1 else 1
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
    known = {folder for suite in SUITES.values() for folder in suite.folders}
    return sorted({p.relative_to(tests).parts[0] for p in tests.rglob("test_*.py")} - known)


def run(python: Path, arguments: list[str], output: IO[bytes] | None = None, nice: int = 0) -> tuple[int, float]:
    """Run the interpreter of an environment in the checkout, `nice` to others, its output going to a file or to ours.

    Returns (status, seconds).
    """
    environment = dict(os.environ)
    # Tiny models gain nothing from threads, and two busy pools on few cores lose a lot.
    environment.setdefault("OMP_NUM_THREADS", "1")
    began = time.monotonic()
    command = ["nice", "-n", str(nice), str(python), *arguments]
    error = subprocess.STDOUT if output else None
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False, stdout=output, stderr=error).returncode
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
    """Run pytest in one environment; what it printed is shown when it has ended, because suites run side by side."""
    suite = SUITES[name]
    with tempfile.TemporaryDirectory() as folder:
        report, printed = Path(folder) / "report.xml", Path(folder) / "printed"
        arguments = ["-m", "pytest", "-q", f"--junitxml={report}", *suite.paths]
        if wanted := " and ".join(filter(None, (suite.marker, "not slow" if fast else ""))):
            arguments += ["-m", wanted]
        with printed.open("wb") as output:
            status, seconds = run(
                environments_home() / suite.environment / "bin" / "python", arguments, output, suite.nice
            )
        n = counts(report)
        text = printed.read_text(errors="replace")
    print(f"\n== tests, {name} ({suite.environment} environment): {' '.join(suite.paths)}\n{text}", flush=True)
    bad = n["failures"] + n["errors"]
    detail = f"{n['tests'] - bad - n['skipped']} passed, {bad} failed, {n['skipped']} skipped"
    if fast and status == NO_TESTS_COLLECTED:
        return Result(f"tests ({name})", True, seconds, "nothing fast")
    if status == NO_TESTS_COLLECTED or n["tests"] == 0:
        detail = "no test ran"
    return Result(f"tests ({name})", status == 0 and n["tests"] > 0, seconds, detail)


def summary(results: list[Result], seconds: float) -> str:
    lines = [f"  {'ok    ' if r.passed else 'FAILED'}  {r.name:<14} {r.seconds:6.0f} s   {r.detail}" for r in results]
    verdict = "all passed" if all(r.passed for r in results) else "FAILED"
    return "\n".join(["", *lines, f"{verdict} in {seconds:.0f} s"])


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
    needed = {"train" if part == "lint" else SUITES[part].environment for part in parts}
    for name in sorted(needed):
        if not (environments_home() / name / "bin" / "python").exists():
            print(f"env/test.py: there is no {name} environment; build it with `make env-{name}`", file=sys.stderr)
            return 2
    began = time.monotonic()
    suites = [part for part in parts if part != "lint"]
    print(f"running {', '.join(parts)}, {_AT_ONCE} at a time; each is shown when it has ended", flush=True)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        linted = pool.submit(lint) if "lint" in parts else None
        results = list(pool.map(lambda name: run_suite(name, options.fast), suites))
        results = [*(linted.result() if linted else []), *results]
    print(summary(results, time.monotonic() - began), flush=True)
    return 0 if all(r.passed for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
