"""The paper's comparisons of training choices, on the demo world: tables and figures by one command.

    python examples/demo/ablations.py runs/demo --out runs/ablations [--steps 120] [--only target gamma ...]

Reads a finished demo (`base/`, `samples/`; with `--train`, other completions of its base model), trains one LenVM for
each choice with the demo's own configuration, the same number of optimizer steps each, and evaluates it on the same
validation completions. Each group changes one thing: what the value head predicts, how tokens are weighted, gamma, how
many samples a prompt, how many prompts, how many of the base's layers the backbone keeps, the order of the batches, the
precision. The tables and figures are those of `lenvm eval ablations` (in OUT) and `lenvm eval scaling` (in OUT/scaling)
of these trainings. Runs in the train environment; a training that is already there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import yaml

from lenvm.evaluation.command_parts import wide_console, write_files
from lenvm.evaluation.runs.ablations import ablations_outcome
from lenvm.evaluation.runs.read import read_runs
from lenvm.evaluation.runs.scaling import scaling_outcome
from lenvm.evaluation.tables import show_outcome

HERE = Path(__file__).resolve().parent
SIZES = ("samples per prompt", "prompts", "layers")
"""Groups of which `lenvm eval scaling` makes something."""
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "target": {
        "return (default)": {},
        "length": {"lenvm_target": "length"},
        "normalized_length": {"lenvm_target": "normalized_length"},
        "log_length": {"lenvm_target": "log_length"},
    },
    "weighting": {"token (default)": {}, "trajectory": {"lenvm_weighting": "trajectory"}},
    "gamma": {
        "auto (default)": {},
        "0.9": {"lenvm_gamma": 0.9},
        "0.99": {"lenvm_gamma": 0.99},
        "0.999": {"lenvm_gamma": 0.999},
    },
    "samples per prompt": {
        "all (default)": {},
        "8": {"samples": 8},
        "4": {"samples": 4},
        "2": {"samples": 2},
        "1": {"samples": 1},
    },
    "prompts": {"all (default)": {}, "1/4": {"share": 0.25}, "1/16": {"share": 0.0625}},
    "layers": {"all (default)": {}, "2": {"layers": 2}, "1": {"layers": 1}},
    "batches": {"shuffled (default)": {}, "by_prompt": {"lenvm_batches": "by_prompt"}},
    "lambda": {"1 (default)": {}, "0.95": {"lenvm_lambda": 0.95}, "0": {"lenvm_lambda": 0.0}},
    "precision": {"float32 (default)": {}, "bfloat16": {"bf16": True}, "float16": {"fp16": True}},
}


def subset(rows: list[str], samples: int | None, share: float) -> list[str]:
    """The first `samples` completions of each prompt, of a random share of the prompts.

    Args:
        rows: JSON lines with `prompt_id`.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        groups[json.loads(row)["prompt_id"]].append(row)
    names = sorted(groups)
    random.Random(0).shuffle(names)
    kept = names[: max(1, round(share * len(names)))]
    return [row for name in kept for row in groups[name][:samples]]


def samples_a_prompt(completions: Path) -> int:
    """The largest number of completions of one prompt in a file."""
    with completions.open(encoding="utf-8") as rows:
        return max(Counter(json.loads(row)["prompt_id"] for row in rows).values())


def shallower(base: Path, layers: int, directory: Path) -> Path:
    """The first `layers` layers of `base` with all else of it, saved in `directory`."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(base)
    config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    model = AutoModelForCausalLM.from_pretrained(base, config=config)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    return directory


def train(settings: dict[str, Any]) -> None:
    """A LlamaFactory training in this process, the state of an earlier one forgotten."""
    from lenvm_lf import _hook

    _hook.install()
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from llamafactory.train.tuner import run_exp

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    run_exp(settings)


def trained(demo: Path, out: Path, steps: int, changes: dict[str, Any], extra: dict[str, Any],
            completions: Path) -> Path:  # fmt: skip
    """Train one choice on `completions`, unless it is there, and return its folder."""
    samples, share, layers = changes.get("samples"), changes.get("share", 1.0), changes.get("layers")
    changes = {key: value for key, value in changes.items() if key not in ("samples", "share", "layers")}
    named = {**changes, "samples": samples, "share": share, "layers": layers, "steps": steps, **extra}
    name = "_".join(
        f"{key.removeprefix('lenvm_')}-{value}" for key, value in sorted(named.items()) if value is not None
    )
    run = out / name.replace("/", "-")
    if not (run / "eval_results.json").is_file():
        run.mkdir(parents=True, exist_ok=True)
        rows = completions.read_text(encoding="utf-8").splitlines(keepends=True)
        (run / "train.jsonl").write_text("".join(subset(rows, samples, share)), encoding="utf-8")
        held_out = demo / "samples" / "val.jsonl"
        info = {
            "train": {"file_name": "train.jsonl", "formatting": "lenvm"},
            "val": {"file_name": str(held_out.resolve()), "formatting": "lenvm"},
        }
        (run / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        base = shallower(demo / "base", layers, run / f"{layers}-layers") if layers else demo / "base"
        settings = yaml.safe_load((HERE / "train_lenvm.yaml").read_text(encoding="utf-8"))
        settings |= {
            "model_name_or_path": str(base),
            "dataset_dir": str(run),
            "output_dir": str(run),
            "max_steps": steps,
            "warmup_steps": steps // 8,
            "save_strategy": "no",
            "lenvm_heads": "value",  # what is compared
        }
        train(settings | extra | changes)
    return run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("demo", type=Path, help="folder of a finished demo run")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--train", type=Path, help="completions to train on; default: the demo's samples/train.jsonl")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each training")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of every training")
    options = parser.parse_args(arguments)
    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
    extra = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in options.set)}
    completions = options.train or options.demo / "samples" / "train.jsonl"
    most = samples_a_prompt(completions)
    groups = {name: choices for name, choices in GROUPS.items() if name in options.only}
    folders: dict[str, list[str]] = {}
    for group, choices in groups.items():
        for choice, changes in choices.items():
            if changes.get("samples", 0) >= most:
                continue  # that is all of them
            print(f"{group}: {choice}", flush=True)
            run = trained(options.demo, options.out, options.steps, changes, extra, completions)
            folders.setdefault(group, []).append(str(run))
    every = list(dict.fromkeys(run for group in folders.values() for run in group))  # the default, once and first
    outcomes = {options.out: ablations_outcome(read_runs(every), {"steps": options.steps, **extra})}
    sized = list(dict.fromkeys(run for group in SIZES for run in folders.get(group, [])))
    if len(sized) > 1:
        outcomes[options.out / "scaling"] = scaling_outcome(read_runs(sized), "length_mae", {"steps": options.steps})
    for folder, outcome in outcomes.items():
        write_files(outcome, folder)
        show_outcome(outcome, wide_console())
    print(f"{options.out}/tables.md, {options.out}/table.csv, {options.out}/figures.png")


if __name__ == "__main__":
    main()
