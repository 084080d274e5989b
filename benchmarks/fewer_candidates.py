#!/usr/bin/env python3
"""What scoring fewer candidates costs in length control and gains in speed.

    benchmarks/fewer_candidates.py --run runs/demo          a finished run of `lenvm pipeline`

For each setting of `--lenvm-max-candidates`, `--lenvm-candidate-mass` and `--lenvm-min-entropy`: a server over the
run's base model and LenVM, `lenvm eval control` against it (equal_to, posterior), and the speed of guided against
unguided requests. One Markdown row a setting.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from lenvm.pipeline.recipe import Server
from lenvm.pipeline.server import SglangServer

SETTINGS: tuple[tuple[str, ...], ...] = (
    (),
    ("--lenvm-max-candidates", "8"),
    ("--lenvm-candidate-mass", "0.999"),
    ("--lenvm-candidate-mass", "0.99"),
    ("--lenvm-candidate-mass", "0.95"),
    ("--lenvm-min-entropy", "0.01"),
    ("--lenvm-min-entropy", "0.1"),
)


def figure(estimate: dict[str, Any] | None, digits: int) -> str:
    """Value and half the width of its 95 % interval."""
    if estimate is None:
        return "-"
    return f"{estimate['value']:.{digits}f} ±{(estimate['high'] - estimate['low']) / 2:.{digits}f}"


def measure(run: Path, flags: tuple[str, ...], home: Path, targets: int, speed: bool) -> str:
    """One setting's row."""
    settings = Server(lenvm_args=flags, args=("--context-length", "512"))
    name = " ".join(flags).replace("--lenvm-", "") or "none"
    with SglangServer(str(run / "base"), settings, home / "log", run / "lenvm") as server:
        command = [
            sys.executable, "-m", "lenvm", "eval", "control", "--server", server.url,
            "--prompts", str(run / "prepare" / "prompts_test.jsonl"), "--samples", str(run / "samples" / "test.jsonl"),
            "--base", str(run / "base"), "--out", str(home / "out"), "--modes", "equal_to", "--controllers",
            "posterior", "--targets", str(targets), "--median-samples", "1", "--share-samples", "1",
            "--curve-samples", "1", "--biases", "-6", "--budgets", "0.6", "--concurrency", "64",
            "--speed" if speed else "--no-speed",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        return f"| {name} | {done.stdout[-300:]} {done.stderr[-300:]} |"
    results = json.loads((home / "out" / "results.json").read_text())
    (row,) = (r for r in results["control"] if r["controller"] == "posterior")
    rate = results.get("speed") or {"guided": float("nan"), "ratio": float("nan")}
    return (
        f"| {name} | {figure(row['length_score'], 1)} | {figure(row['kept'], 1)} | {figure(row['base_log_prob'], 2)} | "
        f"{figure(row['accuracy'], 0)} | {rate['guided']:.0f} | {rate['ratio']:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--targets", type=int, default=3, help="equal_to targets a prompt")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the settings")
    given = parser.parse_args()
    print("| setting | Length Score | exact, % | log-prob a token | accuracy, % | tokens/s | guided / unguided |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for number, flags in enumerate(SETTINGS):
        if given.only is None or number in given.only:
            with tempfile.TemporaryDirectory() as home:
                print(measure(given.run, flags, Path(home), given.targets, not given.no_speed), flush=True)


if __name__ == "__main__":
    main()
