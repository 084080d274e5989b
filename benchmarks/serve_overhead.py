#!/usr/bin/env python3
"""What length control costs, as ratios taken in one run.

- `steps`: SGLang's scheduler in this process. Guided over unguided tokens per second, beside what the bare forwards of
  the two models would allow (both timed in the same run), and with both models mocked the plug-in's own time a step.
- `http`: one server with a length value model and one without. Guided over unguided tokens per second and the time
  between tokens at one server; unguided traffic at both.

Runs of the things compared alternate, so that a machine shared with others disturbs them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

# not this folder: its kernels.py would stand for the package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.common import Table
from benchmarks.inprocess import InProcess, measure, overhead, quiet
from benchmarks.pairs import make_pair

MODES: dict[str, dict[str, Any]] = {
    "posterior": {},
    "hard": {"length_control": "hard"},
    "soft": {"length_control": "soft"},
    "bias": {"length_bias": -1.0},
}


def fields_of(mode: str, tokens: int) -> dict[str, Any]:
    """Length fields of a mode for an answer of `tokens` tokens."""
    fields = MODES[mode]
    return fields if "length_bias" in fields else {**fields, "length_target": tokens}


def milliseconds(seconds: list[float]) -> list[float]:
    return [s * 1e3 for s in seconds]


# ----- steps --------------------------------------------------------------------------------------------------------


def steps(table: Table, pair: tuple[Path, Path], options: argparse.Namespace, flags: list[str]) -> None:
    """The scheduler in this process."""
    engine = InProcess(*pair, flags, most=max(options.batch))
    tokens = options.tokens
    for rows in options.batch:
        for wanted in options.candidates:
            for mode in options.modes:
                sizes = f"B={rows} K={wanted} L={options.context} {mode}"
                fields = fields_of(mode, 4 * tokens)
                sampling = {"top_k": wanted, "temperature": options.temperature}
                step = measure(engine, rows, options.context, tokens, fields, options.repeats, **sampling)
                for provider, values in step.samples.items():
                    table.add(f"step ms: {provider}", "ours", sizes, milliseconds(values))
                rate = rows / median(step.guided)
                table.add("guided tokens per second", "ours", sizes, [rows / t for t in step.guided])
                table.add("unguided tokens per second", "ours", sizes, [rows / t for t in step.unguided])
                table.add("guided/unguided", "ours", sizes, [step.ratio])
                table.add("guided/unguided", "allowed by the bare forwards", sizes, [step.allowed])
                idle = ""
                if step.allowed_interrupted is not None:
                    table.add("guided/unguided", "allowed, interrupted as long", sizes, [step.allowed_interrupted])
                    idle = f", of what an idle interruption as long allows {step.ratio / step.allowed_interrupted:.3f}"
                times = ", ".join(f"{n} {median(v) * 1e3:.3f}" for n, v in step.samples.items())
                print(
                    f"{sizes}: guided/unguided {step.ratio:.3f}, allowed by the bare forwards {step.allowed:.3f}, "
                    f"of it reached {step.ratio / step.allowed:.3f}{idle} ({rate:.0f} tokens/s guided; ms: {times})",
                    flush=True,
                )
    for rows in options.batch:
        for mode in options.modes:
            sizes = f"B={rows} K={engine.worker.width} L={options.context} {mode}"
            fields = fields_of(mode, 4 * tokens)
            sampling = {"temperature": options.temperature}
            plain, guided = overhead(engine, rows, options.context, tokens, fields, options.repeats, **sampling)
            table.add("mocked models, step ms", "unguided", sizes, milliseconds(plain))
            table.add("mocked models, step ms", "guided", sizes, milliseconds(guided))
            own = (median(guided) - median(plain)) * 1e3
            table.add("own overhead ms", "ours", sizes, [own])
            print(
                f"{sizes}, both models mocked: {own:.3f} ms of ours a step, guided/unguided "
                f"{median(plain) / median(guided):.3f}",
                flush=True,
            )


# ----- http ---------------------------------------------------------------------------------------------------------


def traffic(url: str, rows: int, options: argparse.Namespace, fields: dict[str, Any], seed: int) -> dict[str, Any]:
    """`rows` requests at once by SGLang's own client, `bench_serving`; what it wrote of them.

    An answer has exactly `options.tokens` tokens: `ignore_eos` and a target exclude each other, so stop tokens are
    banned up to the last.
    """
    from sglang.benchmark.serving import cli_main

    sampling = {
        "max_new_tokens": options.tokens,
        "min_new_tokens": options.tokens - 1,
        "temperature": options.temperature,
    }
    body = json.dumps({"sampling_params": sampling, **fields})
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        words = ["bench_serving", "--backend", "sglang", "--base-url", url, "--dataset-name", "random-ids"]
        words += ["--tokenize-prompt", "--random-input-len", str(options.context), "--random-range-ratio", "1"]
        words += ["--random-output-len", str(options.tokens), "--num-prompts", str(rows), "--seed", str(seed)]
        words += ["--warmup-requests", "0", "--disable-tqdm", "--ready-check-timeout-sec", "0"]
        words += ["--output-file", file.name, "--output-details", "--extra-request-body", body]
        with mock.patch.object(sys, "argv", words), redirect_stdout(StringIO()):
            cli_main()
        found: dict[str, Any] = json.loads(Path(file.name).read_text().splitlines()[-1])
    if found["completed"] != rows or found["total_output_tokens"] != rows * options.tokens:
        raise SystemExit(
            f"serve_overhead: {rows} answers of {options.tokens} tokens were asked for, {found['completed']} with "
            f"{found['total_output_tokens']} tokens in all came: {[e for e in found.get('errors', []) if e][:1]}"
        )
    return found


def http(table: Table, pair: tuple[Path, Path], options: argparse.Namespace, flags: list[str]) -> None:
    """Two servers."""
    from lenvm.pipeline.recipe import Server
    from lenvm.pipeline.server import SglangServer

    base, lenvm = pair
    settings = Server(args=[*flags, "--disable-radix-cache", "--max-running-requests", str(max(options.batch))])
    logs = options.out.parent
    with (
        SglangServer(str(base), settings, logs / "with.log", lenvm) as served,
        SglangServer(str(base), settings, logs / "without.log") as plain,
    ):
        for rows in options.batch:
            runs: dict[str, tuple[str, dict[str, Any]]] = {
                "unguided": (served.url, {}),
                "unguided, no LenVM": (plain.url, {}),
                **{mode: (served.url, fields_of(mode, options.tokens)) for mode in options.modes},
            }
            rates: dict[str, list[float]] = {name: [] for name in runs}
            between: dict[str, list[float]] = {name: [] for name in runs}
            for repeat in range(options.repeats + 1):
                # a machine may be slower after the guided ones; what is compared comes after them in turn
                first, second, *rest = runs
                for name in (first, second, *rest) if repeat % 2 else (second, first, *rest):
                    url, fields = runs[name]
                    found = traffic(url, rows, options, fields, repeat)
                    if repeat:  # the first is for warming up
                        rates[name].append(found["output_throughput"])
                        between[name].extend(gap for gaps in found["itls"] for gap in gaps)
            sizes = f"B={rows} L={options.context}"
            for name in runs:
                table.add("tokens per second", name, sizes, rates[name])
                if between[name]:
                    table.add("ms between tokens", name, sizes, milliseconds(between[name]))
            middle = median(rates["unguided"])
            alone = middle / median(rates["unguided, no LenVM"])
            table.add("unguided with/without LenVM", "ours", sizes, [alone])
            line = f"{sizes}, HTTP: unguided with/without LenVM {alone:.3f}"
            for mode in options.modes:
                ratio = median(rates[mode]) / middle
                table.add("guided/unguided over HTTP", "ours", f"{sizes} {mode}", [ratio])
                line += f", {mode}/unguided {ratio:.3f}"
            print(line, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="+", choices=("steps", "http"), help="which parts to run")
    parser.add_argument("--dry", action="store_true", help="one small size; times mean nothing")
    parser.add_argument("--pair", type=Path, nargs=2, metavar=("BASE", "LENVM"), help="model directories")
    parser.add_argument("--base", default="small", help="without --pair: shape of the base model (benchmarks/pairs.py)")
    parser.add_argument("--value", default="small", help="without --pair: shape of the value model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128], help="requests at once")
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 16], help="K, by the requests' top-k")
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=["posterior", "bias"], help="of guidance")
    parser.add_argument("--context", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--temperature", type=float, default=1.0, help="of every request")
    parser.add_argument("--repeats", type=int, default=5, help="alternating runs")
    parser.add_argument("--flags", default="", help="further flags of the servers, in one string")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks/serve_overhead.csv"), help="CSV file to write"
    )
    options = parser.parse_args(arguments)
    if options.dry:
        options.base = options.value = "tiny"
        options.batch, options.candidates, options.modes = [2], [4], ["posterior"]
        options.context, options.tokens, options.repeats = 16, 8, 1
    quiet()
    gpu = torch.cuda.is_available()
    with (
        tempfile.TemporaryDirectory() as folder,
        Table(options.out, "dry run: times mean nothing" * options.dry) as table,
    ):
        flags = options.flags.split()
        pair = tuple(options.pair) if options.pair else None
        if pair is None:
            longest = options.context + 8 * options.tokens
            dtype = "bfloat16" if gpu else "float32"
            pair = make_pair(Path(folder), options.base, options.value, longest, dtype, 8 * options.tokens)
            flags += ["--load-format", "dummy"]
        if not gpu:
            # without a bound SGLang reserves most of the machine's memory
            flags += ["--max-total-tokens", str(max(options.batch) * (options.context + options.tokens + 8))]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        if "http" in options.parts:
            http(table, pair, options, flags)
        if "steps" in options.parts:
            steps(table, pair, options, flags)
    print(f"in {options.out}")


if __name__ == "__main__":
    main()
