#!/usr/bin/env python3
"""What `lenvm_shared_prefix` saves: K completions of one prompt as one sequence, against K rows.

Forward and backward of the same model over the same completions, packed and unpacked in turn. Beside the measured
speed-up stand two of theory: `linear`, K (P + L) / (P + K L) tokens in everything but attention; `flops`, which counts
attention too as it is computed here, under a dense mask over the packed sequence, (P + K L)^2 against K (P + L)^2 / 2
for the causal rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch
from transformers import Qwen2Config

from benchmarks.common import Table
from lenvm import LengthBins, LengthValueModel, LenvmConfig
from lenvm.objective import Objective
from lenvm_lf.collator import IGNORE, DenseReturnCollator
from lenvm_lf.shared_prefix import SharedPrefixCollator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 1000


def sampled(prompt: int, completions: int, length: int) -> list[dict[str, Any]]:
    """Rows of one prompt as the processor makes them."""
    start = torch.randint(0, VOCABULARY, (prompt,)).tolist()
    return [
        {
            "input_ids": start + torch.randint(0, VOCABULARY, (length - 1,)).tolist(),
            "prompt_length": prompt,
            "completion_length": length,
            "censored": False,
            "prompt_hash": 0,
        }
        for _ in range(completions)
    ]


def flops(model: Any, shape: torch.Size, dense: bool) -> float:
    """Multiplications of a forward pass: weights times tokens, and attention."""
    rows, tokens = shape
    config = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    attention = 2 * tokens**2 * config.hidden_size * config.num_hidden_layers * (1.0 if dense else 0.5)
    return rows * (tokens * weights + attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048], help="prompt lengths in tokens")
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/shared_prefix.csv"))
    options = parser.parse_args()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=max(options.prompts) + options.length,
    )
    lenvm = LenvmConfig(gamma=0.997, bins=LengthBins.for_max_length(options.length).centres)
    model = LengthValueModel.from_backbone(config, lenvm)
    model.to(DEVICE, torch.bfloat16 if options.bf16 else torch.float32).train()
    objective = Objective(lenvm.value_space, lenvm.length_bins)

    def step(batch: dict[str, torch.Tensor]) -> float:
        batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
        labels, censored = batch.pop("labels"), batch.pop("censored")
        batch.pop("prompt")
        completion = batch.pop("completion", None)
        out = model(**batch)
        value, length = objective.sums(out.z, out.length_logits, labels, labels != IGNORE, censored, completion)
        loss = (value + 0.1 * length) / (labels != IGNORE).sum()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.item()

    with Table(options.out) as table:
        for prompt in options.prompts:
            rows = sampled(prompt, options.completions, options.length)
            batches = {"rows": DenseReturnCollator(0)(rows), "shared prefix": SharedPrefixCollator(0)(rows)}
            seconds: dict[str, list[float]] = {name: [] for name in batches}
            losses = {}
            for i in range(options.repeats + 1):
                for name, batch in batches.items():
                    began = time.perf_counter()
                    losses[name] = step(batch)
                    if DEVICE == "cuda":
                        torch.cuda.synchronize()
                    if i:  # the first one allocates
                        seconds[name].append(time.perf_counter() - began)
            if not options.bf16 and abs(losses["rows"] - losses["shared prefix"]) > 1e-5:
                raise SystemExit(f"the losses differ: {losses}")
            sizes = f"P={prompt} K={options.completions} L={options.length} H={options.hidden} layers={options.layers}"
            took = {
                name: table.add("shared_prefix ms", name, sizes, [1e3 * s for s in seconds[name]]) for name in batches
            }
            shapes = [batches[name]["input_ids"].shape for name in ("rows", "shared prefix")]
            linear = shapes[0].numel() / shapes[1].numel()
            theory = flops(model, shapes[0], False) / flops(model, shapes[1], True)
            found = took["rows"] / took["shared prefix"]
            for name, value in (("measured", found), ("linear", linear), ("flops", theory)):
                table.add("shared_prefix speed-up", name, sizes, [value])
            print(
                f"{sizes}: speed-up {found:.2f}; theory {linear:.2f} without attention, {theory:.2f} with", flush=True
            )
    print(options.out)


if __name__ == "__main__":
    main()
