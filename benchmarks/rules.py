#!/usr/bin/env python3
"""Rules that were considered and the rules that were taken, on a finished demo: which of them is of use?

    python benchmarks/rules.py runs/demo --out runs/rules

- `targets`: `equal_to` by the paper's arg min in value space and in length space, by `soft` and by the posterior. One
  server a variant, `lenvm eval control` on it; Length Score, exact hits, base log-probability, accuracy.
- `tilts`: exponential tilting (Eq. 12) beside the reference implementation's others. `lenvm eval tradeoff`: the area
  under accuracy against mean length, over the lengths that all variants reach.

A variant takes the place of a rule in the server through a plug-in that this script writes; the rest of the
server is as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np
import torch
from torch import Tensor

from lenvm import guidance
from lenvm.bins import LengthBins
from lenvm.candidates import Candidates
from lenvm.definitions import length_from_logit, logit_from_length
from lenvm.evaluation.bootstrap import interval_ends, replicate_weights
from lenvm.evaluation.client import ServerSettings
from lenvm.evaluation.grading import verified
from lenvm.evaluation.problems import read_problems
from lenvm.evaluation.runner import ask_plan
from lenvm.evaluation.tradeoff import Curve, TradeoffSizes, curves_of, graded, make_plan, mean_accuracy
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Mode, Scores
from lenvm.pipeline.recipe import Server
from lenvm.pipeline.server import SglangServer

VARIANT = "LENVM_BENCHMARK_RULE"
"""Environment variable of a server: which variant takes the place of a rule."""
STEPS = 60
"""Of a bisection."""


# ----- variants -----------------------------------------------------------------------------------------------------


def nearest(lengths: Tensor, candidates: Candidates, rows: GuidanceRows) -> Tensor:
    """The candidate whose predicted remaining length [R, K] is nearest to what is left; ties as in `guidance.hard`."""
    cost = (lengths.masked_fill(candidates.is_stop, 0.0) - rows.left[:, None].clamp(min=0)).abs()
    cost = cost.masked_fill(~candidates.kept, torch.inf)
    choice = guidance.first_by(cost, -candidates.log_p, candidates.token_ids)
    return torch.full_like(candidates.log_p, -torch.inf).scatter_(-1, choice[:, None], 0.0)


def hard_in_length_space(candidates: Candidates, scores: Scores, rows: GuidanceRows, lenvm: LenvmConfig) -> Tensor:
    """arg min |n_hat - m|, n_hat from the value (Eq. 5)."""
    assert bool((rows.mode == Mode.EQUAL_TO).all())
    return nearest(length_from_logit(scores.z.float(), lenvm.gamma), candidates, rows)


def hard_by_expected_length(candidates: Candidates, scores: Scores, rows: GuidanceRows, lenvm: LenvmConfig) -> Tensor:
    """arg min |E[n] - m|, from the length distribution."""
    assert scores.length_log_q is not None
    return nearest(LengthBins.cached(lenvm.bins).expected(scores.length_log_q.float()), candidates, rows)


def logit_bias(candidates: Candidates, scores: Scores, rows: GuidanceRows, lenvm: LenvmConfig) -> Tensor:
    """p exp(s z). A stop token, whose z is minus infinity, counts as one token to go."""
    least = logit_from_length(torch.ones(()), lenvm.gamma)
    z = torch.where(candidates.is_stop, least, scores.z.float().clamp(min=least))
    return candidates.log_p + rows.bias[:, None] * z


def scaled_value(candidates: Candidates, scores: Scores, rows: GuidanceRows, lenvm: LenvmConfig) -> Tensor:
    """p exp(beta u) with E_p'[u] = exp(s) E_p[u]."""
    return _scaled(guidance.discounted_length(candidates, scores), candidates, rows)


def scaled_length(candidates: Candidates, scores: Scores, rows: GuidanceRows, lenvm: LenvmConfig) -> Tensor:
    """p exp(beta n_hat) with E_p'[n_hat] = exp(s) E_p[n_hat]."""
    lengths = length_from_logit(scores.z.float(), lenvm.gamma).masked_fill(candidates.is_stop, 0.0)
    return _scaled(lengths / 100, candidates, rows)


def _scaled(x: Tensor, candidates: Candidates, rows: GuidanceRows) -> Tensor:
    """p exp(beta x) with E_p'[x] = exp(s) E_p[x], or as near to it as the candidates allow, by bisection."""
    x = x.double().masked_fill(~candidates.kept, 0.0)
    log_p = candidates.log_p.double()
    wanted = (log_p.exp() * x).sum(-1, keepdim=True) * rows.bias.double().exp()[:, None]
    low, high = torch.full_like(wanted, -1e6), torch.full_like(wanted, 1e6)
    for _ in range(STEPS):
        middle = (low + high) / 2
        short = (torch.softmax(log_p + middle * x, -1) * x).sum(-1, keepdim=True) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return torch.log_softmax(log_p + (low + high) / 2 * x, -1).float()


Rule = Callable[[Candidates, Scores, GuidanceRows, LenvmConfig], Tensor]
TARGETS: dict[str, tuple[str, Rule | None]] = {
    "hard, value space (the paper's; taken)": ("hard", None),
    "hard, length space, n_hat of the value": ("hard", hard_in_length_space),
    "hard, length space, E[n] of the distribution": ("hard", hard_by_expected_length),
    "soft (taken)": ("hard", guidance.soft),
    "posterior (taken; the default)": ("posterior", None),
}
"""Which controller's requests the variant answers: `lenvm eval control` asks all targets of hard and posterior only."""
TILTS: dict[str, tuple[tuple[float, ...], Rule | None]] = {
    "p exp(beta u) (the paper's; taken)": ((-40, -16, -6, -2), None),
    "p exp(s z), logit bias": ((-8, -4, -1.5, -0.5), logit_bias),
    "E[u] scaled": ((-0.3, -0.1, -0.03, -0.01), scaled_value),
    "E[n_hat] scaled": ((-0.3, -0.1, -0.03, -0.01), scaled_length),
}
"""Strengths, chosen to cover the same lengths."""


def register() -> None:
    """Entry point of the plug-in: put the variant in its rule's place."""
    name = os.environ[VARIANT]
    for control, rule in (
        (Control.HARD, TARGETS[name][1] if name in TARGETS else None),
        (Control.BIAS, TILTS[name][1] if name in TILTS else None),
    ):
        if rule is not None:
            guidance.RULES[control] = rule


# ----- measuring ----------------------------------------------------------------------------------------------------


def write_plugin(folder: Path) -> None:
    """Metadata of a distribution whose entry point is `register`."""
    info = folder / "lenvm_benchmark_rules-0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lenvm-benchmark-rules\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nrules = benchmarks.rules:register\n")


@contextmanager
def serving(name: str, options: argparse.Namespace, plugin: Path, out: Path) -> Iterator[SglangServer]:
    """A server with the variant in its rule's place."""
    environment = {VARIANT: name, "PYTHONPATH": f"{ROOT}:{plugin}"}
    settings = Server(env=environment)
    with SglangServer(str(options.run / "base"), settings, out / "server.log", options.run / "lenvm") as server:
        yield server


def controlled(
    name: str, command: tuple[str, ...], options: argparse.Namespace, plugin: Path, out: Path
) -> dict[str, Any]:
    """`lenvm eval control` on a server with the variant; its results.json."""
    if not (out / "results.json").is_file():
        with serving(name, options, plugin, out) as server:
            words = [sys.executable, "-m", "lenvm", "eval", *command, "--server", server.url, "--out", str(out)]
            subprocess.run([*words, "--concurrency", "64"], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def shown(estimate: dict[str, Any] | None, digits: int = 1) -> str:
    """Value and the wider side of its 95 % interval."""
    if estimate is None:
        return "-"
    value, low, high = (float(estimate[key]) for key in ("value", "low", "high"))
    return f"{value:.{digits}f} ±{max(value - low, high - value):.{digits}f}"


def targets(options: argparse.Namespace, plugin: Path) -> None:
    """The first table."""
    print("| equal_to by | Length Score | exact % | log p a token | accuracy % |")
    print("|---|---|---|---|---|", flush=True)
    run = options.run
    for number, (name, (control, _)) in enumerate(TARGETS.items()):
        command = (
            *("control", "--prompts", str(run / "prepare" / "prompts_test.jsonl"), "--base", str(run / "base")),
            *("--samples", str(run / "samples" / "test.jsonl"), "--modes", "equal_to", "--controllers", control),
            *("--targets", str(options.targets), "--median-samples", "1", "--share-samples", "1", "--biases", ""),
            *("--budgets", "", "--no-speed", "--max-prompts", str(options.prompts)),
        )
        results = controlled(name, command, options, plugin, options.out / f"target{number}")
        rows = {row["controller"]: row for row in results["control"]}
        for key in ("base", control) if number == 0 else (control,):
            row = rows[key]
            label = "base model" if key == "base" else name
            cells = (shown(row["length_score"]), shown(row["kept"]), shown(row["base_log_prob"], 2))
            print(f"| {label} | {' | '.join(cells)} | {shown(row['accuracy'], 0)} |", flush=True)


def tilts(options: argparse.Namespace, plugin: Path) -> None:
    """The second table: each variant's curve, and its area minus that of exponential tilting, resampling problems."""
    problems = read_problems(options.run / "prepare" / "prompts_test.jsonl", options.problems)
    by_id = {p.id: p for p in problems}
    curves: dict[str, Curve] = {}
    for number, (name, (strengths, _)) in enumerate(TILTS.items()):
        sizes = TradeoffSizes(samples=4, biases=strengths, budgets=(), passes=(1,), seed=0)
        with serving(name, options, plugin, options.out / f"tilt{number}") as server:
            asked = ask_plan(
                make_plan(problems, sizes),
                lambda request: by_id[request.prompt_id].messages,
                ServerSettings(server.url, 64, 384, {"temperature": 1.0, "top_p": 1.0, "min_p": 0.01}),
                options.out / f"tilt{number}" / "requests.jsonl",
                {"problems": [p.id for p in problems], "sizes": sizes.model_dump(mode="json"), "variant": name},
                lambda *_: None,
            )
            found = graded(asyncio.run(asked), problems, sizes, verified)
        (curves[name],) = (c for c in curves_of(found, sizes) if c.label == "tilting by length_bias")
    low = max(float(c.lengths.mean(-1).min()) for c in curves.values())
    high = min(float(c.lengths.mean(-1).max()) for c in curves.values())
    weights = replicate_weights(len(problems))
    ones = np.ones((1, len(problems)))
    print(f"\n| tilting | mean accuracy % from {low:.1f} to {high:.1f} tokens | minus the first | tokens, accuracy % |")
    print("|---|---|---|---|")
    first = next(iter(curves.values()))
    for name, curve in curves.items():
        area, base = (100 * mean_accuracy(c, low, high, ones)[0] for c in (curve, first))
        draws = 100 * (mean_accuracy(curve, low, high, weights) - mean_accuracy(first, low, high, weights))
        ends = interval_ends(draws)
        gain = "" if curve is first else f"{area - base:+.1f} [{ends[0]:.1f}, {ends[1]:.1f}]"
        points = sorted(zip(curve.lengths.mean(-1), 100 * curve.accuracies.mean(-1), strict=True))
        shown_points = ", ".join(f"({x:.0f}, {y:.0f})" for x, y in points)
        print(f"| {name} | {area:.1f} | {gain} | {shown_points} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="finished demo: base, lenvm, samples, prepare")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("targets", "tilts"))
    parser.add_argument("--prompts", type=int, default=104, help="of the first table")
    parser.add_argument("--targets", type=int, default=3, help="a prompt")
    parser.add_argument("--problems", type=int, default=48, help="of the second table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_plugin(Path(folder))
        for part in (targets, tilts):
            if options.only in (None, part.__name__):
                part(options, Path(folder))


if __name__ == "__main__":
    main()
