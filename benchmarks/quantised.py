#!/usr/bin/env python3
"""What an attached head loses when the base model's weights are rounded under it.

A head is tied to the hidden states it was distilled on, and a server that quantises its base model while loading
(`--quantization`) has slightly other ones. Here the matrices of the base's layers are rounded to 8 and to 4 bits, one
scale for each output channel, as weight-only quantisation does; embeddings and lm_head stay. A Markdown table: KL to
the teacher on held-out prompts, and the Length Score of the same guided answers, with the head as it was distilled.

    python benchmarks/quantised.py runs/demo --head runs/attached
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# not this folder: its kernels.py would stand for the package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lenvm.attached import AttachedHead
from lenvm.distillation.control import ControlCheck
from lenvm.distillation.run import MOST_HELD_OUT, split_by_prompt, spread, stop_tokens
from lenvm.distillation.states import StateReader, read_completions
from lenvm.distillation.training import Settings, held_out_kl
from lenvm.modeling import LengthValueModel


@torch.no_grad()
def round_weights(model: torch.nn.Module, bits: int) -> None:
    """Round the weights of all linear layers but the lm_head, symmetrically, one scale for each output channel."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            scale = layer.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            layer.weight.copy_((layer.weight / scale).round() * scale)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="finished demo: base, samples, lenvm")
    parser.add_argument("--head", type=Path, required=True, help="attached head of that base")
    parser.add_argument("--answers", type=int, default=256, help="guided answers")
    args = parser.parse_args()
    completions, sampled = read_completions(args.run / "samples" / "train.jsonl")
    held_out = spread(split_by_prompt(completions)[1], MOST_HELD_OUT)
    teacher = LengthValueModel.from_pretrained(args.run / "lenvm", dtype="auto", attn_implementation="sdpa").eval()
    attached = AttachedHead.from_pretrained(args.head, args.run / "base")
    usual = Settings()
    print("|weights of the base|KL held out, nats|Length Score|answers|\n|-|-|-|-|")
    for bits in (0, 8, 4):
        base = AutoModelForCausalLM.from_pretrained(args.run / "base", dtype="auto").eval()
        stops = stop_tokens(base, AutoTokenizer.from_pretrained(args.run / "base"))
        if bits:
            round_weights(base, bits)
        reader = StateReader(base, teacher, sampled, stops, usual.candidates, usual.states, "base")
        unseen = reader.read(held_out, torch.Generator().manual_seed(0))
        ended = spread([c for c in held_out if c.completion[-1] in stops], args.answers)
        score = ControlCheck(reader, ended, attached.lenvm, None)(attached.lookahead_head)
        kl = held_out_kl(attached.lookahead_head, unseen, None)
        print(f"|{f'{bits} bits' if bits else 'as they are'}|{kl:.4f}|{score:.1f}|{len(ended)}|", flush=True)


if __name__ == "__main__":
    main()
