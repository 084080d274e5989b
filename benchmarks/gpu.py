#!/usr/bin/env python3
"""Everything that wants a GPU, in one call: `python3 benchmarks/gpu.py --out runs/gpu`.

On a machine with an NVIDIA GPU: the serving environment (`env/build.py serve`, unless --python names one), the kernels'
tests on the device, a CUDA graph of the whole guidance step, the kernels' times, the ways of attention there are, the
counts of a step and whether its CUDA graphs say what it says without, guided against unguided serving and its scaling,
with random weights of real shapes. Nothing is downloaded but packages.

`--dry` runs the same steps end to end on a CPU in small sizes. Each step writes a log and a CSV into the folder; one
that fails does not stop the others, and the exit status says so at the end. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def steps(dry: bool, out: Path) -> dict[str, list[str]]:
    """Arguments of the interpreter by the step's name, in the order of running."""

    def script(name: str, *arguments: str, csv: str = "") -> list[str]:
        return [str(BENCHMARKS / f"{name}.py"), *arguments, "--out", str(out / f"{csv or name}.csv")]

    if dry:
        return {
            "graph": [str(BENCHMARKS / "graph.py"), "--dry"],
            "kernels": script("kernels", "--dry"),
            "attention": script("attention", "--dry"),
            "value_step": script("value_step", "--dry"),
            "serve_overhead": script("serve_overhead", "steps", "http", "--dry"),
            "scaling": script("scaling", "--dry"),
        }
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"]
    pairs = {"7b": ("7b", "1.5b"), "3b": ("3b", "1.5b")}
    found = {
        "tests": tests,
        "graph": [str(BENCHMARKS / "graph.py")],
        "kernels": script("kernels"),
        "attention": script("attention"),
        "value_step": script("value_step", "--base", "1.5b", "--value", "0.5b"),
    }
    for name, (base, value) in pairs.items():
        for context in ("1024", "8192"):
            shape = ("--base", base, "--value", value, "--context", context, "--tokens", "64", "--repeats", "3")
            batch = ("1", "8", "32", "128") if context == "1024" else ("1", "8", "32")
            found[f"steps_{name}_{context}"] = script(
                "serve_overhead", "steps", *shape, "--batch", *batch, csv=f"steps_{name}_{context}"
            )
    shape = ("--base", "7b", "--value", "1.5b", "--context", "1024", "--tokens", "128", "--repeats", "3")
    # two servers share the device
    found["http_7b"] = script(
        "serve_overhead", "http", *shape, "--batch", "1", "32", "--flags=--mem-fraction-static 0.4", csv="http_7b"
    )
    contexts = ("128", "1024", "8192", "32768")
    middle = (
        "--middle",
        "8",
        "16",
        "1024",
        "--batch",
        "1",
        "32",
        "128",
        "--candidates",
        "1",
        "4",
        "--context",
        *contexts,
    )
    found["scaling_7b"] = script("scaling", "--base", "7b", "--values", "1.5b", "0.5b", "3b", *middle, csv="scaling_7b")
    return found


def interpreter(options: argparse.Namespace) -> str:
    """The Python of a serving environment; it is built where none is named."""
    if options.python:
        return str(options.python)
    if options.dry:
        return sys.executable
    subprocess.run([sys.executable, str(ROOT / "env" / "build.py"), "serve", "--device", "gpu"], check=True)
    home = Path(os.environ.get("LENVM_ENVS") or ROOT / ".envs").expanduser().resolve()
    return str(home / "serve" / "bin" / "python")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="small sizes on a CPU; times mean nothing")
    parser.add_argument("--python", type=Path, help="interpreter of a serving environment (default: build one)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps only")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for logs and CSV files")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = steps(options.dry, out)
    unknown = set(options.only or ()) - set(chosen)
    if unknown:
        parser.error(f"there is no step {sorted(unknown)[0]!r}; there are {', '.join(chosen)}")
    python = interpreter(options)
    failed = []
    for name, words in chosen.items():
        if options.only and name not in options.only:
            continue
        log = out / f"{name}.log"
        began = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with log.open("wb") as file:
            status = subprocess.run(
                [python, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        verdict = "ok" if status == 0 else f"FAILED with status {status}, see {log}"
        print(f"{name:<20} {time.monotonic() - began:6.0f} s   {verdict}", flush=True)
        if status:
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
