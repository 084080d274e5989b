"""Reinforcement learning on the demo world with and without the LenVM's length advantage (Appendix C).

    python examples/rl/compare.py runs/demo --out runs/rl [--scales 0 2] [--seeds 0 1] [--steps 24]

Reads a finished demo (`base/`, `lenvm/`, `prepare/`). The policy is the demo's base model; the reward is whether the
final answer of a problem is right. For each scale s and each seed it is trained by policy gradient with
A = A_task + s A_length (Eq. 26), on the training problems, and asked the held-out problems before and after, sampled
as the demo samples. Writes tables.md, table.csv, figures.png, results.json; a training that is already in OUT is not
repeated. Runs in the train environment.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from policy import draw, token_advantages, update
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenvm import LengthValueModel
from lenvm.evaluation.bootstrap import Clustered, difference_interval, mean_interval, ratio_interval, share_interval
from lenvm.evaluation.command_parts import wide_console, write_files
from lenvm.evaluation.outcome import Outcome, Plot, Series, Sheet, new_outcome
from lenvm.evaluation.schema import Estimate
from lenvm.evaluation.tables import show_outcome

SAMPLING = {"top_p": 0.95, "top_k": 64}
"""As the demo's recipe draws the completions that the LenVM learns from."""
COLOURS = ("base", "posterior", "hard", "shade")
"""Of the scales."""
CHUNK = 16
"""Problems that are asked at once."""


def problems(demo: Path, split: str) -> list[dict[str, Any]]:
    """The problems of a prompt file: the prompts whose answer can be checked."""
    path = demo / "prepare" / f"prompts_{split}.jsonl"
    return [row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if "answer" in row]


def ask(policy: Any, tokenizer: Any, held_out: Sequence[dict[str, Any]], samples: int, max_tokens: int) -> Any:
    """Answers to the held-out problems: `prompt`, `length`, `right` of each."""
    torch.manual_seed(0)  # the same draws for every policy, as far as they agree
    rows = []
    for start in range(0, len(held_out), CHUNK):
        part = held_out[start : start + CHUNK]
        drawn = draw(policy, tokenizer, part, samples, max_tokens, **SAMPLING)
        for i, (length, right) in enumerate(zip(drawn.lengths.tolist(), drawn.right.tolist(), strict=True)):
            rows.append({"prompt": part[i // samples]["id"], "length": length, "right": right})
    return rows


def train(demo: Path, options: argparse.Namespace, scale: float, seed: int) -> dict[str, Any]:
    """One training: mean length and reward of each step, and the answers to the held-out problems afterwards."""
    tokenizer = AutoTokenizer.from_pretrained(demo / "base")
    policy = AutoModelForCausalLM.from_pretrained(demo / "base").eval()
    lenvm = LengthValueModel.from_pretrained(demo / "lenvm").eval() if scale else None
    optimizer = torch.optim.Adam(policy.parameters(), lr=options.learning_rate)
    asked = problems(demo, "train")
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for step in range(options.steps):
        chosen = torch.randperm(len(asked), generator=generator)[: options.prompts].tolist()
        torch.manual_seed(1000 * seed + step)
        answers = draw(policy, tokenizer, [asked[i] for i in chosen], options.group, options.max_tokens)
        update(policy, optimizer, answers, token_advantages(answers, lenvm, options.group, scale, options.lam))
        steps.append({"length": answers.lengths.float().mean().item(), "right": answers.right.mean().item()})
        print(f"s = {scale:g}, seed {seed}, step {step + 1}/{options.steps}: {steps[-1]}", flush=True)
    held_out = problems(demo, "test")[: options.limit]
    return {"steps": steps, "answers": ask(policy, tokenizer, held_out, options.samples, options.max_tokens)}


def kept(path: Path, settings: dict[str, Any], make: Any) -> dict[str, Any]:
    """The result in a file made with these settings; otherwise make it and keep it."""
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] == settings:
            return found["result"]
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "result": result}) + "\n", encoding="utf-8")
    return result


def name(scale: float) -> str:
    """Of a policy."""
    return f"A_task + {scale:g} A_length" if scale else "A_task alone"


def compared(label: str, answers: list[Any], others: list[Any] | None) -> list[Any]:
    """A row: mean length and share of right answers, beside those of others to the same problems."""

    def column(rows: list[Any], key: str) -> Clustered:
        return Clustered([float(row[key]) for row in rows], [row["prompt"] for row in rows])

    length, right = column(answers, "length"), column(answers, "right")
    return [
        label,
        Estimate.of(mean_interval(length.values, length.prompts)),
        Estimate.of(ratio_interval(length, column(others, "length")), 100.0) if others else None,
        Estimate.of(share_interval(right.values, right.prompts), 100.0),
        Estimate.of(difference_interval(right, column(others, "right")), 100.0) if others else None,
        len(answers),
    ]


def outcome_of(before: list[Any], runs: dict[float, dict[int, dict[str, Any]]], parameters: dict[str, Any]) -> Outcome:
    """Tables and figures.

    Args:
        before: answers of the base model to the held-out problems.
        runs: scale -> seed -> result of `train`.
        parameters: what should be recorded.
    """

    pooled = {s: [answer for run in seeds.values() for answer in run["answers"]] for s, seeds in runs.items()}
    head = ["policy", "mean length", "of the base's %", "right %", "minus the base's", "answers"]
    base = compared("base model, before", before, None)
    sheets = [
        Sheet(
            title="Before and after, seeds together",
            head=head,
            rows=[base, *(compared(name(s), answers, before) for s, answers in pooled.items())],
        )
    ]
    if 0.0 in pooled and len(pooled) > 1:
        sheets.append(
            Sheet(
                title="With the length advantage against without",
                head=["policy", "mean length", "of that without %", "right %", "minus that without", "answers"],
                rows=[compared(name(s), answers, pooled[0.0]) for s, answers in pooled.items() if s],
            )
        )
    each = [
        compared(f"{name(s)}, seed {k}", r["answers"], before) for s, seeds in runs.items() for k, r in seeds.items()
    ]
    sheets.append(Sheet(title="Each training", head=head, rows=[base, *each]))
    plots = [
        Plot(
            name="held_out",
            title="Held-out problems, 95 % intervals",
            x_label="mean length, tokens",
            y_label="right, %",
            series=[
                Series(label=label, x=[length.value], y=[right.value], y_low=[right.low], y_high=[right.high],
                       style="points", colour=colour)
                for (label, length, _, right, *_), colour in zip(
                    sheets[0].rows, ("bias", *(COLOURS[i % len(COLOURS)] for i in range(len(runs)))), strict=True
                )
                if isinstance(length, Estimate) and isinstance(right, Estimate)
            ],
        )
    ]  # fmt: skip
    for key, title, unit, factor in (
        ("length", "Answers drawn in training, mean of seeds", "tokens", 1.0),
        ("right", "Right answers in training, mean of seeds", "%", 100.0),
    ):
        series = []
        for i, (scale, seeds) in enumerate(runs.items()):
            values = zip(*([factor * step[key] for step in run["steps"]] for run in seeds.values()), strict=True)
            means = [sum(step) / len(step) for step in values]
            x = [float(n + 1) for n in range(len(means))]
            series.append(Series(label=name(scale), x=x, y=means, colour=COLOURS[i % len(COLOURS)]))
        plots.append(
            Plot(name=f"training_{key}", title=title, x_label="policy-gradient step", y_label=unit, series=series)
        )
    return new_outcome(
        "rl",
        "Policy gradient with the length advantage (Appendix C)",
        parameters,
        summary=[
            f"{len({a['prompt'] for a in before})} held-out problems, {len(next(iter(runs.values())))} seed(s) of each "
            "training; intervals: 95 %, resampled by problem, so they do not speak about other seeds."
        ],
        sheets=sheets,
        plots=plots,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("demo", type=Path, help="folder of a finished demo run")
    parser.add_argument("--out", type=Path, default=Path("runs/rl"))
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 2.0], help="s of Eq. 26; above 0 shortens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=24, help="policy-gradient steps of each training")
    parser.add_argument("--prompts", type=int, default=8, help="problems a step")
    parser.add_argument("--group", type=int, default=8, help="answers to each")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--lam", type=float, default=0.95, help="lambda of Eq. 24")
    parser.add_argument("--max-tokens", type=int, default=192, help="a longer answer is cut, and wrong")
    parser.add_argument("--samples", type=int, default=4, help="answers to each held-out problem")
    parser.add_argument("--limit", type=int, default=None, help="only so many held-out problems")
    options = parser.parse_args(arguments)
    if options.group < 2:
        parser.error(f"--group must be 2 or more, got {options.group}: A_task compares the answers to one problem.")
    for part in ("base/config.json", "lenvm/config.json", "prepare/prompts_train.jsonl", "prepare/prompts_test.jsonl"):
        if not (options.demo / part).is_file():
            parser.error(f"there is no {options.demo / part}; give a finished demo run (`make demo` makes runs/demo).")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = {k: v for k, v in vars(options).items() if k not in ("demo", "out", "scales", "seeds")}

    def untrained() -> Any:
        policy = AutoModelForCausalLM.from_pretrained(options.demo / "base").eval()
        tokenizer = AutoTokenizer.from_pretrained(options.demo / "base")
        held_out = problems(options.demo, "test")[: options.limit]
        return {"answers": ask(policy, tokenizer, held_out, options.samples, options.max_tokens)}

    before = kept(options.out / "before.json", settings, untrained)["answers"]
    runs: dict[float, dict[int, Any]] = {scale: {} for scale in options.scales}
    for seed in options.seeds:
        for scale in options.scales:
            path = options.out / f"s{scale:g}_seed{seed}.json"
            runs[scale][seed] = kept(path, settings, lambda s=scale, k=seed: train(options.demo, options, s, k))
    outcome = outcome_of(before, runs, {**settings, "scales": options.scales, "seeds": options.seeds} | SAMPLING)
    write_files(outcome, options.out)
    show_outcome(outcome, wide_console())
    print(f"{options.out}/tables.md, {options.out}/figures.png")


if __name__ == "__main__":
    main()
