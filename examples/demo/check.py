"""Does a trained base model have the length structure the demo needs? Prints one table; exits 1 if a goal is missed.

    python examples/demo/check.py OUT/base OUT/prompts_test.jsonl [--problems 60] [--open 60] [--samples 64]

No length value model is needed: conditioning the base model's own samples on "at most T tokens" is what the posterior
controller approximates. Runs in the train environment, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from world import grade

MAX_NEW_TOKENS = 384
BATCH = 256


@dataclass(frozen=True)
class Completion:
    """One completion: its text without the stop token, its length with it, and whether it ended by itself."""

    text: str
    length: int
    stopped: bool


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[dict],
    temperature: float,
    batch: int = BATCH,
) -> list[Completion]:
    """One completion a prompt row, in order; temperature 0 is greedy. Prompts are batched with left padding."""
    texts = [tokenizer.apply_chat_template(p["messages"], tokenize=False, add_generation_prompt=True) for p in prompts]
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature > 0
        else {"do_sample": False}
    )
    out: list[Completion] = []
    for begin in range(0, len(texts), batch):
        encoded = tokenizer(
            texts[begin : begin + batch],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        ids = model.generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, use_cache=True, **sampling,
        )  # fmt: skip
        for row in ids[:, encoded["input_ids"].shape[1] :].tolist():
            stopped = tokenizer.eos_token_id in row
            length = row.index(tokenizer.eos_token_id) + 1 if stopped else len(row)
            out.append(Completion(tokenizer.decode(row[: length - stopped]), length, stopped))
    return out


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def length_statistics(groups: Sequence[Sequence[Completion]]) -> dict[str, float]:
    """Length statistics of sampled completions, one group a prompt."""
    every = [c.length for group in groups for c in group]
    spread = [
        statistics.stdev(lengths) / statistics.mean(lengths)
        for group in groups
        if (lengths := [c.length for c in group])
    ]
    return {
        "mean length": statistics.mean(every),
        "p5": percentile(every, 0.05),
        "p50": percentile(every, 0.5),
        "p95": percentile(every, 0.95),
        "longest": max(every),
        "std/mean for one prompt": statistics.mean(spread),
        "natural stops": statistics.mean(c.stopped for group in groups for c in group),
    }


def budget_statistics(
    groups: Sequence[Sequence[Completion]], answers: Sequence[str], share: float = 0.6
) -> dict[str, float]:
    """Accuracy of sampled answers to problems: as they are, cut at ``share`` of their mean length, and given they fit.

    The conditioned accuracy is a mean over prompts; a prompt without any sample that short counts as wrong.
    """
    budget = share * statistics.mean(c.length for group in groups for c in group)
    right = [[(c.length, grade(c.text, answer)) for c in group] for group, answer in zip(groups, answers, strict=True)]
    short = [[ok for length, ok in group if length <= budget] for group in right]
    return {
        "budget": budget,
        "sampled accuracy": statistics.mean(ok for group in right for _, ok in group),
        "accuracy cut at budget": statistics.mean(ok and length <= budget for group in right for length, ok in group),
        "accuracy at most budget": statistics.mean(statistics.mean(group) if group else 0.0 for group in short),
        "samples within budget": statistics.mean(length <= budget for group in right for length, _ in group),
    }


def check(model_dir: Path, prompt_file: Path, problems: int, opens: int, samples: int, seed: int) -> bool:
    """Print the table; whether all goals are met."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in prompt_file.read_text(encoding="utf-8").splitlines()]
    every_problem = [row for row in rows if "answer" in row]
    begin = time.perf_counter()
    greedy = complete(model, tokenizer, every_problem, temperature=0.0)
    greedy_accuracy = statistics.mean(
        grade(c.text, row["answer"]) for c, row in zip(greedy, every_problem, strict=True)
    )

    asked = every_problem[:problems] + [row for row in rows if "answer" not in row][:opens]
    flat = complete(model, tokenizer, [row for row in asked for _ in range(samples)], temperature=1.0)
    groups = [flat[i * samples : (i + 1) * samples] for i in range(len(asked))]
    lengths = length_statistics(groups)
    solved = [row["answer"] for row in asked if "answer" in row]
    budget = budget_statistics(groups[: len(solved)], solved)

    figures = {"greedy accuracy": greedy_accuracy, **lengths, "p95 / p5": lengths["p95"] / lengths["p5"]}
    figures |= {
        f"problems: {name}": value
        for name, value in length_statistics(groups[: len(solved)]).items()
        if name in ("mean length", "p5", "p95")
    }
    figures |= budget
    figures["kept by cutting"] = budget["accuracy cut at budget"] / budget["sampled accuracy"]
    figures["kept by at most"] = budget["accuracy at most budget"] / budget["sampled accuracy"]
    goals = {
        "greedy accuracy": (">=", 0.75),
        "p95 / p5": (">=", 10.0),
        "std/mean for one prompt": (">=", 0.3),
        "natural stops": (">=", 0.98),
        "kept by cutting": ("<=", 0.5),
        "kept by at most": (">=", 0.9),
    }
    seconds = time.perf_counter() - begin
    print(f"{len(every_problem)} problems greedy; {len(asked)} prompts x {samples} sampled at T=1; {seconds:.0f} s")
    good = True
    for name, value in figures.items():
        verdict = ""
        if name in goals:
            sign, goal = goals[name]
            met = value >= goal if sign == ">=" else value <= goal
            good &= met
            verdict = f"{sign} {goal:g}  {'met' if met else 'MISSED'}"
        print(f"{name:34} {value:9.3f}  {verdict}".rstrip())
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="trained base model")
    parser.add_argument("prompts", type=Path, help="prompt file, JSONL")
    parser.add_argument(
        "--problems", type=int, default=60, help="problems to sample (default 60; greedy accuracy uses all of the file)"
    )
    parser.add_argument("--open", type=int, default=60, help="open prompts to sample (default 60)")
    parser.add_argument("--samples", type=int, default=64, help="samples a prompt (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if a.samples < 2 or a.problems < 1:
        parser.error(f"--samples must be at least 2 and --problems at least 1, got {a.samples} and {a.problems}")
    sys.exit(0 if check(a.model, a.prompts, a.problems, a.open, a.samples, a.seed) else 1)


if __name__ == "__main__":
    main()
