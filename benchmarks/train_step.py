#!/usr/bin/env python3
"""A training step of a length value model beside those of what else it could have been.

Providers, all on the same random Qwen2 backbone, batch and optimizer: `ours` (`stage: lenvm`'s model and objective,
both heads), `sft` (plain language modelling), `wrapper` (a value head on top of the full causal LM, trl's
`AutoModelForCausalLMWithValueHead`, which computes the logits of every token and throws them away).

Time: forward, backward and AdamW, the providers in turn in one process. Memory: peak of a process of its own that does
two steps, above what it held after the imports (on a GPU: peak allocated).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import Table, quantiles
from lenvm import LengthBins, LengthValueModel, LenvmConfig
from lenvm.objective import Objective

PROVIDERS = ("ours", "sft", "wrapper")
MIB = 2**20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_step(provider: str, sizes: argparse.Namespace) -> Callable[[], float]:
    """A training step: forward, backward, AdamW; returns the loss."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=4 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.hidden // 32),
        num_key_value_heads=max(1, sizes.hidden // 64),
        max_position_embeddings=sizes.tokens,
        tie_word_embeddings=True,  # as Qwen2.5-1.5B
    )
    lenvm = LenvmConfig(gamma=0.997, bins=LengthBins.for_max_length(3000).centres)
    dtype = torch.bfloat16 if sizes.bf16 else torch.float32
    ids = torch.randint(0, sizes.vocabulary, (sizes.batch, sizes.tokens), device=DEVICE)
    prompt = sizes.tokens // 4
    remaining = torch.arange(sizes.tokens, 0, -1, device=DEVICE).expand_as(ids)
    mask = (torch.arange(sizes.tokens, device=DEVICE) >= prompt).expand_as(ids)
    censored = torch.zeros_like(mask)
    model: Any
    if provider == "ours":
        model = LengthValueModel.from_backbone(config, lenvm)
        objective = Objective(lenvm.value_space, lenvm.length_bins)

        def loss_of() -> torch.Tensor:
            out = model(ids)
            value, length = objective.sums(out.z, out.length_logits, remaining, mask, censored)
            return (value + 0.1 * length) / mask.sum()

    elif provider == "sft":
        model = Qwen2ForCausalLM(config)
        labels = torch.where(mask, ids, -100)

        def loss_of() -> torch.Tensor:
            return model(ids, labels=labels, use_cache=False).loss

    else:
        from trl import AutoModelForCausalLMWithValueHead

        model = AutoModelForCausalLMWithValueHead.from_pretrained(Qwen2ForCausalLM(config))
        target = -(1 - 0.997 ** remaining[mask].float())

        def loss_of() -> torch.Tensor:
            _, _, value = model(ids, use_cache=False)
            return F.mse_loss(-torch.sigmoid(value[mask].float()), target)

    model.to(DEVICE, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def peak_memory(provider: str, sizes: argparse.Namespace) -> float:
    """Of two steps, in MiB; in a process that does nothing else."""
    if provider == "wrapper":
        import trl  # noqa: F401 - its imports are not the step's memory
    if DEVICE == "cuda":
        step = make_step(provider, sizes)
        for _ in range(2):
            step()
        return torch.cuda.max_memory_allocated() / MIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make_step(provider, sizes)
    for _ in range(2):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--tokens", type=int, default=256, help="tokens a row")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/train_step.csv"))
    parser.add_argument("--memory-of", choices=PROVIDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options)))
        return
    sizes = (
        f"V={options.vocabulary} H={options.hidden} layers={options.layers} B={options.batch} T={options.tokens} "
        f"{'bf16' if options.bf16 else 'fp32'}"
    )
    memory = {}
    for provider in PROVIDERS:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", provider]
        memory[provider] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    steps = {provider: make_step(provider, options) for provider in PROVIDERS}
    seconds: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
    for i in range(options.repeats + 1):
        for provider, step in steps.items():
            began = time.perf_counter()
            step()  # ends with a read of the loss, which waits for the device
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if i:  # the first one allocates
                seconds[provider].append(time.perf_counter() - began)
    with Table(options.out) as table:
        for provider in PROVIDERS:
            middle = table.add("train_step ms", provider, sizes, [1e3 * s for s in seconds[provider]])
            table.add("train_step peak MiB", provider, sizes, [memory[provider]])
            print(f"{provider:<8} {middle:10.1f} ms {memory[provider]:10.1f} MiB at the peak")
    ours = quantiles(seconds["ours"])[1]
    for other in ("sft", "wrapper"):
        faster = quantiles(seconds[other])[1] / ours
        print(f"{other} / ours: time {faster:.2f}, peak memory {memory[other] / memory['ours']:.2f}")
    print(f"{sizes}; {options.out}")


if __name__ == "__main__":
    main()
