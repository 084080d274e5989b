#!/usr/bin/env python3
"""Which lookahead head: how wide, whose token vectors, how many states of an answer, and which layer's state.

Heads of one pair are distilled in turn, each from the same completions in the same order, so that one setting at a
time differs from the usual one. Then a Markdown table: KL on held-out prompts, Length Score of the same 64 guided
answers (sharpness 2), size, and minutes. A state of another layer than the last is not what a server has at hand, and
no answers are guided by it: it only shows where the length is to be read.

    python benchmarks/heads.py runs/demo --out runs/heads --epochs 1
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

# not this folder: its kernels.py would stand for the package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from torch import Tensor

from lenvm.distillation.run import Paths, distil
from lenvm.distillation.training import Progress, Settings

HEAD = ("head", "KL held out, nats", "Length Score, 64 answers", "head, MB", "minutes")
VARIANTS: dict[str, dict[str, Any]] = {
    "attached, r = 192, a table, 16 states (usual)": {},
    "r = 16": {"rank": 16},
    "r = 64": {"rank": 64},
    "r = 384": {"rank": 384},
    "the embedding projected, r = 64": {"embedding": "projection", "rank": 64},
    "the embedding projected, r = 192": {"embedding": "projection"},
    "4 states a completion": {"states": 4},
    "64 states a completion": {"states": 64},
    "half the completions": {"epochs": 0.5},
    "on the LenVM's state": {"state_of": "lenvm"},
}


def state_of_layer(layer: int) -> Any:
    """As `lenvm.distillation.states.base_states`, with the states after so many layers."""

    def states(base: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out = base(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        return out.hidden_states[layer], out.logits

    return mock.patch("lenvm.distillation.states.base_states", states)


def distilled(run: Path, out: Path, settings: Settings, layer: int | None) -> tuple[str, ...]:
    """Cells of one row. What was distilled before is not distilled again."""
    paths = Paths(run / "base", run / "lenvm", run / "samples" / "train.jsonl", out)
    began = time.perf_counter()

    def notify(progress: Progress, total: int) -> None:
        print(f"  {out.name}: round {progress.rounds} of {total}", file=sys.stderr, flush=True)

    with nullcontext() if layer is None else state_of_layer(layer):
        progress = distil(paths, settings, notify)
    scores = [entry["length_score"] for entry in progress.history if "length_score" in entry]
    if not (out / "timed").is_file():
        (out / "timed").write_text(f"{(time.perf_counter() - began) / 60:.1f}")
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 2**20
    if settings.state_of == "lenvm":
        size -= sum(file.stat().st_size for file in paths.lenvm.glob("*.safetensors")) / 2**20
    score = f"{scores[-1]:.1f}" if scores else ""
    return f"{progress.best:.4f}", score, f"{size:.2f}", (out / "timed").read_text()


def main() -> None:
    """Distil what was not distilled yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="finished demo: base, samples, lenvm")
    parser.add_argument("--out", type=Path, required=True, help="folder of the heads")
    parser.add_argument("--epochs", type=float, default=1.0, help="how often a completion is read")
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 2], help="states after so many layers as well")
    args = parser.parse_args()
    usual = {"epochs": args.epochs, "control_every": 1000}  # at the end only
    rows: dict[str, tuple[dict[str, Any], int | None]] = {name: (change, None) for name, change in VARIANTS.items()}
    rows |= {f"state after layer {n}": ({"control_every": 0}, n) for n in args.layers}
    print("|" + "|".join(HEAD) + "|\n" + "|-" * len(HEAD) + "|")
    for number, (name, (change, layer)) in enumerate(rows.items()):
        share = {"epochs": args.epochs * change["epochs"]} if "epochs" in change else {}
        settings = Settings(**{**usual, **change, **share})
        cells = distilled(args.run, args.out / f"{number:02d}", settings, layer)
        print("|" + "|".join((name, *cells)) + "|", flush=True)


if __name__ == "__main__":
    main()
