#!/usr/bin/env python3
"""Which length value model to take: a full one, one with a lookahead head, or a head attached to the base model.

Each is served in turn beside the same base model and asked the same prompts, targets and seeds by `lenvm eval
control`; then Markdown tables: Length Score, exact hits and base log-probability with 95 % intervals, prediction at the
prompt, tokens a second guided and unguided in turn on the same server, and what it adds to the base model's memory.

    python benchmarks/lookahead.py runs/demo --attached runs/attached --lookahead runs/lookahead --out runs/compare

`--speed-rounds N` measures the speed alone, more thoroughly: pairs of an unguided and a guided block, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys
from pathlib import Path
from statistics import quantiles

# not this folder: its kernels.py would stand for the package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from lenvm.evaluation.client import Asker, ServerSettings, sampling_of
from lenvm.evaluation.command_parts import max_tokens_of
from lenvm.evaluation.data import read_natural
from lenvm.evaluation.runner import speed_summary
from lenvm.evaluation.schema import Estimate, Results
from lenvm.evaluation.speed import Block, measure_speed
from lenvm.pipeline.recipe import Server
from lenvm.pipeline.server import SglangServer

HEADER = (
    "source",
    "mode",
    "rule",
    "Length Score",
    "kept %",
    "log p / token",
    "accuracy %",
    "natural stops %",
    "answers",
)
SECOND = (
    *("source", "error of E[L] at the prompt %", "bias %", "at_most 60 % of the mean: share of the base's accuracy %"),
    *("unguided tokens/s", "guided", "ratio", "memory"),
)


def evaluate(name: str, lenvm: Path, args: argparse.Namespace) -> tuple[Results, str]:
    """Serve, ask, score; results and the server's log."""
    out = args.out / name
    log = out / "server.log"
    base, hard = str(args.run / "base"), "hard," if name == "full" else ""
    if not (out / "results.json").is_file():
        with SglangServer(base, Server(), log, lenvm=lenvm) as server:
            subprocess.run(
                [
                    *(sys.executable, "-m", "lenvm", "eval", "control", "--server", server.url),
                    *("--prompts", str(args.run / "prepare" / "prompts_test.jsonl")),
                    *("--samples", str(args.run / "samples" / "test.jsonl")),
                    *("--base", base, "--lenvm", str(lenvm), "--out", str(out), "--modes", "equal_to,at_most"),
                    *("--controllers", f"{hard}posterior_a1,posterior,posterior_a4", "--biases", "", "--budgets", ""),
                    *("--median-samples", "1", "--concurrency", str(args.concurrency)),
                    *("--max-prompts", str(args.max_prompts)),
                ],
                check=True,
            )
    return Results.model_validate_json((out / "results.json").read_text()), log.read_text(errors="replace")


def thorough(lenvm: Path, args: argparse.Namespace) -> str:
    """Guided over unguided tokens a second in pairs of neighbouring blocks: median, and the middle half."""
    data = read_natural(args.run / "prepare" / "prompts_test.jsonl", args.run / "samples" / "test.jsonl")

    async def blocks(url: str) -> list[Block]:
        settings = ServerSettings(url, args.concurrency, max_tokens_of(data.sampling), sampling_of(data.sampling))
        async with Asker(settings) as asker:
            return await measure_speed(asker, data.prompts, args.speed_rounds, 6 * args.concurrency)

    log = args.out / f"speed-{lenvm.name}.log"
    with SglangServer(str(args.run / "base"), Server(), log, lenvm=lenvm) as server:
        found = asyncio.run(blocks(server.url))
    rates = [(b.guided, b.tokens / b.seconds) for b in found]
    ratios = []
    for pair in zip(rates[::2], rates[1::2], strict=True):
        by_kind = dict(pair)
        ratios.append(by_kind[True] / by_kind[False])
    low, middle, high = quantiles(ratios, n=4)
    summary = speed_summary(found, args.concurrency)
    return (
        f"|{summary.unguided:.0f}|{summary.guided:.0f}|{summary.ratio:.2f}|{middle:.2f} [{low:.2f}, {high:.2f}]"
        f"|{len(ratios)}|"
    )


def shown(value: Estimate | None, digits: int = 1) -> str:
    """A figure and its interval."""
    if value is None:
        return ""
    return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def memory(lenvm: Path, log: str) -> str:
    """Weights on disk, and what the server says of caches and states."""
    weights = sum(file.stat().st_size for file in lenvm.glob("*.safetensors")) / 2**20
    pool = re.search(r"value KV pool of (\d+) slots.*?, ([\d.]+) MB", log)
    states = re.search(r"states of ([\d.]+) MB, no KV cache", log)
    rest = (
        f"KV cache {pool[2]} MB ({pool[1]} slots)" if pool else f"states {states[1]} MB, no KV cache" if states else ""
    )
    return f"weights {weights:.2f} MB, {rest}"


def main() -> None:
    """Run what was not run yet and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="finished demo: base, samples, lenvm, prepare")
    parser.add_argument("--attached", type=Path)
    parser.add_argument("--lookahead", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-prompts", type=int, default=104)
    parser.add_argument("--speed-rounds", type=int, help="measure the speed alone, in so many pairs of blocks")
    args = parser.parse_args()
    sources = {"full": args.run / "lenvm", "lookahead": args.lookahead, "attached": args.attached}
    if args.speed_rounds:
        args.out.mkdir(parents=True, exist_ok=True)
        print("|source|unguided tokens/s|guided|ratio|of neighbouring blocks [middle half]|pairs|\n|-|-|-|-|-|-|")
        for name, path in sources.items():
            if path is not None:
                print(f"|{name}{thorough(path, args)}", flush=True)
        return
    found = {name: (path, *evaluate(name, path, args)) for name, path in sources.items() if path is not None}
    print("|" + "|".join(HEADER) + "|\n" + "|-" * len(HEADER) + "|")
    for name, (_, results, _) in found.items():
        for row in [*results.control, *results.side]:
            if row.controller == "base" and name != "full":
                continue
            cells = (shown(row.length_score), shown(row.kept), shown(row.base_log_prob, 2), shown(row.accuracy))
            rule = (name, row.mode, row.label)
            print("|" + "|".join((*rule, *cells, shown(row.natural_stops), str(row.length_score.n))) + "|")
    print("\n|" + "|".join(SECOND) + "|\n" + "|-" * len(SECOND) + "|")
    for name, (path, results, log) in found.items():
        cells = ["", "", ""]
        if results.prediction is not None:
            best = next(p for p in results.prediction.predictors if p.key == "distribution")
            cells[:2] = [shown(best.error_mean), shown(best.bias_mean)]
        if results.trade_off is not None:
            cells[2] = ", ".join(shown(point.share_of_base) for point in results.trade_off.budgets)
        speed = results.speed
        if speed is not None:
            cells += [f"{speed.unguided:.0f}", f"{speed.guided:.0f}", f"{speed.ratio:.2f}"]
        print("|" + "|".join((name, *cells, memory(path, log))) + "|")


if __name__ == "__main__":
    main()
