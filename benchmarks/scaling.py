#!/usr/bin/env python3
"""How the cost of a guided step grows: with the context, the batch, K and the value model's size.

One axis is varied at a time, the others stay at a middle size. Steps of SGLang's scheduler in a process of its own for
each value model; guided and unguided steps alternate. Ratios are of one run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

# not this folder: its kernels.py would stand for the package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.common import Table
from benchmarks.inprocess import InProcess, measure, quiet
from benchmarks.pairs import make_pair


def sizes(options: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(batch, candidates, context) of every measurement, the middle first."""
    batch, candidates, context = options.middle
    found = [(batch, candidates, context)]
    found += [(b, candidates, context) for b in options.batch]
    found += [(batch, k, context) for k in options.candidates]
    found += [(batch, candidates, n) for n in options.context]
    return list(dict.fromkeys(found))


def one_value_model(options: argparse.Namespace) -> None:
    """Every size that concerns one value model."""
    quiet()
    gpu = torch.cuda.is_available()
    wanted = sizes(options) if options.value == options.values[0] else sizes(options)[:1]
    most, longest = max(b for b, _, _ in wanted), max(n for _, _, n in wanted)
    pool = max(b * (n + options.tokens + 8) for b, _, n in wanted)
    note = "dry run: times mean nothing" * options.dry
    with tempfile.TemporaryDirectory() as folder, Table(options.out, note) as table:
        dtype = "bfloat16" if gpu else "float32"
        pair = make_pair(Path(folder), options.base, options.value, longest + options.tokens + 8, dtype)
        flags = ["--load-format", "dummy", "--lenvm-max-candidates", str(max(k for _, k, _ in wanted))]
        flags += [] if gpu else ["--max-total-tokens", str(pool)]
        engine = InProcess(*pair, flags, most=most)
        for rows, candidates, context in wanted:
            fields = {"length_target": 2 * options.tokens}
            sampling = {"top_k": candidates, "temperature": 1.0}
            step = measure(engine, rows, context, options.tokens, fields, options.repeats, **sampling)
            label = f"{options.base}+{options.value} B={rows} K={candidates} L={context}"
            for provider, values in step.samples.items():
                table.add("step ms", provider, label, [v * 1e3 for v in values])
            table.add("guided/unguided", "ours", label, [step.ratio])
            table.add("guided/unguided", "allowed by the bare forwards", label, [step.allowed])
            print(
                f"{label}: guided/unguided {step.ratio:.3f}, allowed {step.allowed:.3f}; ms a step: unguided "
                f"{median(step.unguided) * 1e3:.3f}, guided {median(step.guided) * 1e3:.3f}, value forward "
                f"{median(step.value) * 1e3:.3f}",
                flush=True,
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="two small sizes; times mean nothing")
    parser.add_argument("--base", default="small", help="shape of the base model (benchmarks/pairs.py)")
    parser.add_argument("--values", nargs="+", default=["small", "tiny", "medium"], help="shapes of the value model")
    parser.add_argument(
        "--middle", type=int, nargs=3, default=[8, 16, 256], metavar=("B", "K", "L"), help="middle size"
    )
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32], help="further batches")
    # a top-k of 1 is greedy decoding to the host, which is guided over all K candidates
    parser.add_argument("--candidates", type=int, nargs="*", default=[2, 4], help="further K, by the requests' top-k")
    parser.add_argument("--context", type=int, nargs="*", default=[128, 1024, 4096], help="further contexts")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/scaling.csv"), help="CSV file to write")
    parser.add_argument("--value", help=argparse.SUPPRESS)  # a child's
    options = parser.parse_args(arguments)
    if options.dry:
        options.base, options.values, options.middle = "tiny", ["tiny"], [2, 4, 16]
        options.batch, options.candidates, options.context, options.tokens, options.repeats = [], [2], [], 8, 1
    if options.value:
        one_value_model(options)
        return
    given = sys.argv[1:] if arguments is None else arguments
    parts = []
    for value in options.values:
        part = options.out.with_suffix(f".{value}.csv")
        command = [sys.executable, __file__, *given, "--value", value, "--out", str(part)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"scaling: the measurement with the value model {value!r} failed; see above.")
        parts.append(part.read_text().splitlines())
        part.unlink()
    options.out.write_text("\n".join([parts[0][0], *(row for part in parts for row in part[1:])]) + "\n")
    print(f"in {options.out}")


if __name__ == "__main__":
    main()
