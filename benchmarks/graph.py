#!/usr/bin/env python3
"""Does a guidance step fit into a CUDA graph, and does the graph say what the eager step says?

Captured: placing candidates and keeping the last one's KV, the cut, heads, tilting, drawing and what is written of the
draw, of a mixed batch: all of ours in a step but the value model's own forward. The graph is replayed on new logits and
other positions, and compared bit for bit with the eager step. `--dry` runs the same step on the CPU twice, without a
graph.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

# not this folder: its kernels.py would stand for the package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from lenvm.bins import LengthBins
from lenvm.candidates import SamplingRows
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Mode, Scores
from lenvm.heads import LengthHead, ValueHead
from lenvm_kernels import (
    DrawBuffers,
    Keep,
    SlotBuffers,
    TiltSample,
    build_candidates,
    place_candidates,
    tilt_sample,
    value_head,
)


class GuidanceStep:
    """A step of `rows` rows on fixed buffers."""

    def __init__(self, rows: int, vocabulary: int, features: int, slots: int, device: str) -> None:
        g = torch.Generator().manual_seed(0)
        n = torch.arange(rows, device=device)
        ones = torch.ones(rows, device=device)
        self.slots = slots
        self.lenvm = LenvmConfig(gamma=0.9998, bins=LengthBins.for_max_length(8192).centres)
        self.logits = torch.randn(rows, vocabulary, generator=g).to(device) * 3
        self.hidden = torch.randn(rows, slots, features, generator=g).to(device)
        self.lengths, self.start = n * 3 + 40, n * 0 + 40
        self.sampling = SamplingRows(ones, torch.full_like(n, vocabulary), ones * 0.98, ones * 0)
        self.stops = torch.tensor([[1, 5]], device=device).repeat(rows, 1)
        self.heads = ValueHead(features).to(device), LengthHead(features, len(self.lenvm.bins)).to(device)
        for head in self.heads:
            head.reset_parameters(0.05)
        self.guidance = GuidanceRows(
            mode=n % len(Mode), control=n % len(Control), target=n + 40, emitted=n * 0, sharpness=ones * 2,
            tolerance=ones * 0, strict=n % 5 == 0, bias=-ones,
        )  # fmt: skip
        self.seed, self.greedy = n * 977, n % 4 == 0
        self.pool_rows, self.scratch = n, rows + torch.arange(rows * slots, device=device).view(rows, slots)
        kv = [torch.randn(rows + rows * slots, 4, features // 8, device=device) for _ in range(4)]
        self.chosen, self.drawn = self.scratch[:, 0].clone(), torch.empty_like(self.logits)
        self.keep = Keep(SlotBuffers(kv), self.chosen, n)

    @torch.no_grad()
    def run(self) -> TiltSample:
        placed = place_candidates(self.lengths, self.start, self.pool_rows, self.scratch, keep=self.keep)
        guidance = replace(self.guidance, emitted=placed.emitted)
        candidates = build_candidates(self.logits, self.sampling, self.stops, self.slots, guidance, self.slots)
        scores = Scores(value_head(self.hidden, self.heads[0]), self.heads[1](self.hidden).log_softmax(-1))
        into = DrawBuffers(self.drawn, None, self.chosen, self.pool_rows, self.scratch)
        return tilt_sample(candidates, scores, guidance, self.lenvm, self.seed, self.greedy, into=into)

    def change(self, seed: int) -> None:
        """New input in the same buffers."""
        g = torch.Generator().manual_seed(seed)
        self.logits.copy_(torch.randn(self.logits.shape, generator=g) * 3)
        self.hidden.copy_(torch.randn(self.hidden.shape, generator=g))
        self.lengths.add_(7)


def same(a: TiltSample, b: TiltSample) -> bool:
    def equal(x: Tensor, y: Tensor) -> bool:
        return torch.equal(x.nan_to_num(), y.nan_to_num())

    return all(equal(x, y) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="on the CPU, without a graph")
    dry = parser.parse_args().dry
    if not dry and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry runs the step on a CPU, without a graph")
    for rows in (3,) if dry else (1, 8, 32, 128):
        step = GuidanceStep(
            rows, 500 if dry else 151_936, 32 if dry else 1536, 4 if dry else 16, "cpu" if dry else "cuda"
        )
        replay, captured = step.run, None
        if not dry:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step.run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step.run()
            replay = graph.replay  # type: ignore[assignment]
        for seed in range(3):
            step.change(seed)
            found = replay()
            found = found if captured is None else captured
            written = step.drawn.clone(), step.chosen.clone()
            eager = step.run()
            if not same(found, eager) or not all(map(torch.equal, written, (step.drawn, step.chosen))):
                raise SystemExit(f"graph: B={rows}, the replayed graph and the eager step differ on input {seed}.")
        print(f"B={rows}: {'the step repeats itself' if dry else 'the graph says what the eager step says'}")


if __name__ == "__main__":
    main()
