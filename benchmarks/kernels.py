#!/usr/bin/env python3
"""How long the kernels of `lenvm_kernels` take, beside what else could do their work.

Providers: `ours` (the Triton kernels), `eager` (the plain torch reference), `compile` (torch.compile of it), and two
floors: `floor_bytes`, the time to move the inputs and outputs at the copy bandwidth measured in the same run, and
`floor_flops`, the time of the arithmetic at the speed of a large matrix product of the same dtype, measured too. One
CSV row a provider, times in microseconds; then ratios, all of one run.

`--cpu` times what numba compiles for a CPU beside the plain torch, one thread each, the second-level cache flushed.
`--dry` runs everything end to end on a CPU in tiny sizes, `ours` in Triton's interpreter: its times say nothing about a
GPU, nor about anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

DRY, CPU = "--dry" in sys.argv, "--cpu" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
# not this folder: its kernels.py would stand for the package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.common import Table, quantiles
from lenvm.bins import LengthBins
from lenvm.candidates import SamplingRows
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Mode, Scores
from lenvm.heads import LookaheadHead, ValueHead
from lenvm_kernels import build_candidates, lookahead_scores, reference, tilt_sample, value_head

DEVICE = "cpu" if DRY or CPU else "cuda"
FLUSHED = 2**22 if CPU else 2**28
"""Bytes written between two calls, because a decode step leaves nothing of ours in the second-level cache."""


class Case(NamedTuple):
    """One measurement: the same work by two implementations, and its least traffic and arithmetic."""

    name: str
    sizes: str
    ours: Callable[[], Any]
    eager: Callable[..., Any]
    arguments: tuple[Any, ...]
    bytes_moved: int
    flops: int
    dtype: torch.dtype


def size_of(*tensors: torch.Tensor) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def guidance(rows: int, control: Control | None) -> GuidanceRows:
    """Rows of one control, or of all of them in turn."""
    n = torch.arange(rows, device=DEVICE)
    ones = torch.ones(rows, device=DEVICE)
    return GuidanceRows(
        mode=n % len(Mode),
        control=n % len(Control) if control is None else n * 0 + int(control),
        target=n + 40,
        emitted=n,
        sharpness=ones * 2,
        tolerance=ones * 0,
        strict=n < 0,
        bias=ones,
    )


def tilt_cases(rows: int, slots: int, lenvm: LenvmConfig) -> Iterator[Case]:
    bins = len(lenvm.bins)
    log_p = torch.randn(rows, slots, device=DEVICE).log_softmax(-1)
    ids = torch.rand(rows, 5000, device=DEVICE).argsort(-1)[:, :slots].contiguous()
    candidates = reference.Candidates(ids, log_p, torch.zeros_like(ids, dtype=torch.bool))
    scores = Scores(torch.randn(rows, slots, device=DEVICE), torch.randn(rows, slots, bins, device=DEVICE))
    scores = Scores(scores.z, scores.length_log_q.log_softmax(-1))
    seed, greedy = torch.arange(rows, device=DEVICE), torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    traffic = size_of(log_p, ids, scores.z, scores.length_log_q, log_p) + 150 * rows
    for label, control in (("posterior", Control.POSTERIOR), ("bias", Control.BIAS), ("mixed", None)):
        rule = guidance(rows, control)
        present = list(Control) if control is None else [control]
        arguments = (candidates, scores, rule, lenvm, seed, greedy, present)
        yield Case(
            f"tilt_sample {label}",
            f"R={rows} K={slots} B={bins}",
            lambda a=arguments: tilt_sample(*a),  # type: ignore[misc]
            lambda *a: reference.tilt_sample(*a, False, True),
            arguments,
            traffic,
            6 * rows * slots * bins,
            torch.float32,
        )


def head_case(count: int, features: int, dtype: torch.dtype) -> Case:
    head = ValueHead(features)
    head.reset_parameters(0.02)
    head = head.to(DEVICE).to(dtype).requires_grad_(False)
    hidden = torch.randn(count, features, device=DEVICE).to(torch.float32 if DRY else torch.bfloat16)
    return Case(
        f"value_head {str(dtype).removeprefix('torch.')}",
        f"M={count} H={features}",
        lambda: value_head(hidden, head),
        head.forward,
        (hidden,),
        size_of(hidden, head.w1, head.b1, head.w2) + 4 * count,
        2 * count * features * features,
        dtype,
    )


def lookahead_case(rows: int, slots: int, features: int, rank: int, vocabulary: int, lenvm: LenvmConfig) -> Case:
    head = LookaheadHead(features, rank, len(lenvm.bins), tokens=vocabulary)
    head.reset_parameters()
    head = head.to(DEVICE).requires_grad_(False)
    states = torch.randn(rows + 8, features, device=DEVICE).to(torch.float32 if DRY else torch.bfloat16)
    chosen = torch.randperm(rows + 8, device=DEVICE)[:rows]
    ids = torch.randint(0, vocabulary, (rows, slots), device=DEVICE)
    arguments = (states, chosen, ids, head, lenvm, True)
    bins = len(lenvm.bins)
    gathered = 2 * rows * features + 4 * rows * slots * rank
    return Case(
        "lookahead_scores",
        f"R={rows} K={slots} H={features} r={rank}",
        lambda: lookahead_scores(*arguments),
        reference.lookahead_scores,
        arguments,
        size_of(head.w1, head.b1, head.w2, head.b2, ids) + gathered + 4 * rows * slots * (bins + 1),
        2 * rows * rank * (features + slots * bins),
        torch.float32,
    )


def candidates_case(rows: int, vocabulary: int, slots: int, strict: bool = True) -> Case:
    logits = torch.randn(rows, vocabulary, device=DEVICE) * 3
    ones = torch.ones(rows, device=DEVICE)
    sampling = SamplingRows(ones, torch.full((rows,), vocabulary, device=DEVICE), ones * 0.95, ones * 0)
    stops = torch.tensor([[2, -1]], device=DEVICE).repeat(rows, 1)
    arguments = (logits, sampling, stops, slots, guidance(rows, Control.POSTERIOR) if strict else None, slots)
    return Case(
        "build_candidates",
        f"R={rows} V={vocabulary} K={slots}",
        lambda: build_candidates(*arguments),
        reference.build_candidates,
        arguments,
        size_of(logits) + 13 * rows * slots,
        4 * rows * vocabulary,
        torch.float32,
    )


def cpu_cases() -> Iterator[Case]:
    lenvm = LenvmConfig(gamma=0.99, bins=LengthBins.for_max_length(4096).centres)
    for rows in (1, 8, 32):
        for slots in (4, 16):
            yield from tilt_cases(rows, slots, lenvm)
        for vocabulary in (1024, 151_936):
            yield candidates_case(rows, vocabulary, 16, strict=False)


def cases() -> Iterator[Case]:
    lenvm = LenvmConfig(gamma=0.9998, bins=LengthBins.for_max_length(60 if DRY else 32_768).centres)
    for rows in (2,) if DRY else (1, 8, 32, 128):
        for slots in (4,) if DRY else (4, 16):
            yield from tilt_cases(rows, slots, lenvm)
        for features in (32,) if DRY else (1536, 2048):
            for dtype in (torch.float32,) if DRY else (torch.float32, torch.bfloat16):
                yield head_case(rows * (4 if DRY else 16), features, dtype)
        shape = (4, 32, 16, 500) if DRY else (16, 3584, 192, 151_936)
        yield lookahead_case(rows, *shape, lenvm)
        yield candidates_case(rows, 500 if DRY else 151_936, 4 if DRY else 16)


def times(call: Callable[[], Any], repeats: int) -> list[float]:
    """Microseconds of each call, by the device's clock where there is one, `FLUSHED` bytes between calls."""
    for _ in range(3 if not DRY else 1):
        call()
    flush = torch.empty(1 if DRY else FLUSHED, dtype=torch.int8, device=DEVICE)
    if DEVICE == "cpu":
        found = []
        for _ in range(repeats):
            flush.zero_()
            began = time.perf_counter()
            call()
            found.append((time.perf_counter() - began) * 1e6)
        return found
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph, as a serving step runs it: without Python and launch cost between its kernels."""
    if DEVICE == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # the core's posterior copies tables from the host, which a graph cannot hold
        torch.cuda.synchronize()
        return call
    return graph.replay


def machine_speed() -> tuple[float, dict[torch.dtype, float]]:
    """Bytes a microsecond of a large copy, and flops a microsecond of a large matrix product of each dtype."""
    source = torch.empty((2**22 if DRY else 2**30), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / quantiles(times(lambda: target.copy_(source), 5))[1]
    n = 64 if DRY else 8192
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(n, n, device=DEVICE).to(dtype)
        products[dtype] = 2 * n**3 / quantiles(times(lambda a=a: a @ a, 5))[1]  # type: ignore[misc]
    return copy, products


def on_a_cpu(out: Path, repeats: int) -> None:
    """Compiled kernels beside plain torch; calls in turn, because a machine's speed changes."""
    torch.set_num_threads(1)
    with Table(out) as table, torch.no_grad():
        for case in cpu_cases():
            found: dict[str, list[float]] = {"ours": [], "eager": []}
            for _ in range(5):
                found["ours"] += times(case.ours, repeats // 5)
                found["eager"] += times(lambda c=case: c.eager(*c.arguments), repeats // 5)  # type: ignore[misc]
            ours, eager = (table.add(case.name, provider, case.sizes, found[provider]) for provider in found)
            print(f"{case.name}, {case.sizes}: eager/ours {eager / ours:.2f} ({eager:.0f} / {ours:.0f} us)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU; times mean nothing")
    parser.add_argument("--cpu", action="store_true", help="the kernels of a CPU beside plain torch")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/kernels.csv"), help="CSV file to write")
    parser.add_argument("--repeats", type=int, default=2 if DRY else 200, help="timed calls of each provider")
    options = parser.parse_args()
    if CPU:
        on_a_cpu(options.out, options.repeats)
        return
    if not DRY and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --cpu times the kernels of a CPU, --dry runs everything on one")

    copy, products = machine_speed()
    ratios = []
    with Table(options.out, "dry run: times mean nothing" * DRY) as table, torch.no_grad():
        for case in cases():
            # one compilation for each shape, as a serving step has fixed shapes
            torch._dynamo.reset()
            compiled = torch.compile(case.eager, dynamic=False, backend="eager" if DRY else "inductor")
            found: dict[str, list[float]] = {
                "ours": times(graphed(case.ours), options.repeats),
                "eager": times(graphed(lambda c=case: c.eager(*c.arguments)), options.repeats),  # type: ignore[misc]
                "compile": times(
                    graphed(lambda c=case, f=compiled: f(*c.arguments)),
                    options.repeats,  # type: ignore[misc]
                ),
                "floor_bytes": [case.bytes_moved / copy],
                "floor_flops": [case.flops / products[case.dtype]],
            }
            middle = {
                provider: table.add(case.name, provider, case.sizes, values) for provider, values in found.items()
            }
            ours = middle["ours"]
            floor = max(middle["floor_bytes"], middle["floor_flops"])
            line = f"{case.name}, {case.sizes}: eager/ours {middle['eager'] / ours:.2f}"
            ratios.append(f"{line}, compile/ours {middle['compile'] / ours:.2f}, ours/floor {ours / floor:.1f}")
            print(ratios[-1], flush=True)
    print(f"{len(ratios)} cases in {options.out}")
    if DRY:
        print("Dry run on a CPU: `ours` ran in Triton's interpreter; these times mean nothing for a GPU.")


if __name__ == "__main__":
    main()
