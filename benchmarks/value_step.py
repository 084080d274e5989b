#!/usr/bin/env python3
"""What a guided decode step does, counted: forwards, tokens, launches, waits for the device and bytes, in steps of
SGLang's scheduler in this process. Nothing is timed, so it says the same on a busy machine.

Providers: `ours` (as it runs on this machine), `ours, device path` (on a CPU: the path of a GPU, with the plain torch
of the core in place of the kernels and the launches that the kernels would be), `ours, device path, graphs` (the same
on the memory of CUDA graphs; what is in one is one launch on a GPU), `two forwards` (the design that scores the
candidates in one forward and reads the chosen token in a second, by arithmetic).

A launch is an operator that is no view, and a Triton kernel. Bytes are what operators read and write, counted once an
operator; caches are not thought of. What numba compiles for a CPU is no operator, and in neither.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

# not this folder: its kernels.py would stand for the package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import Table
from benchmarks.inprocess import InProcess, again, forwards_of, quiet, without_graphs
from benchmarks.pairs import make_pair

FIELDS = {
    "posterior": {"length_target": 4096},
    "posterior top-k 4": {"length_target": 4096},
    "bias": {"length_bias": -2.0},
    "values": {"return_length_values": True},
}
SAMPLING = {"posterior top-k 4": {"top_k": 4}}
KERNELS = {"place_candidates": 1, "build_candidates": 2, "masses": 1, "lookahead_scores": 2, "tilt_sample": 1}
"""Launches of each: a kernel; top-k and a kernel, and one more (`masses`) where a row has a top-p without
a top-k; two kernels; a kernel."""
INSIDE = {"attend_prefix": 2, "value_head": 2, "draw": 1}
"""Of those that belong to the forward, each a phase of its own: two kernels; a kernel and the sum of its parts; the
`tilt_sample` of a graph."""
PICKS = {"index", "index_select", "gather", "embedding"}
PUTS = {"index_put_", "_index_put_impl_", "index_copy_", "scatter_"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Counts by phase: `host`, `sampler` (the host's own), `ours`, `value` (the value model's forward and its heads),
    `kernels` (what kernels replace), and likewise those of `INSIDE`.

    Attributes:
        counts: phase -> counter of launches, bytes, waits, forwards, tokens.
        waits: where they are outside `host`, for a reader.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases = ["host"]
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.waits: list[str] = []

    @property
    def now(self) -> Counter[str]:
        return self.counts[self.phases[-1]]

    def wait(self, what: str) -> None:
        self.now["waits"] += 1
        if self.phases[-1] not in ("host", "sampler"):
            self.waits.append(f"{self.phases[-1]}: {what}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in ("empty", "detach", "sym_size"):
            self.now["launches"] += 1
            self.now["bytes"] += moved(name, args, kwargs, out)
        masks = name in ("index", "index_put_", "index_put") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if name in WAITS or masks or func is torch.ops.aten.repeat_interleave.Tensor:
            self.wait(name)
        return out

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.phases.append(name)
        try:
            yield
        finally:
            self.phases.pop()

    def wrapped(
        self,
        function: Callable[..., Any],
        phase: str,
        count: str = "",
        tokens: Callable[..., torch.Tensor] | None = None,
    ) -> Any:
        """The function in a phase; counted under `count`, with the tokens that `tokens` finds in its arguments, unless
        it is a part of that phase already (of a graph that is not one)."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if phase in self.phases:
                return function(*args, **kwargs)
            with self.phase(phase):
                if count:
                    self.now[count] += 1
                    if count == "build_candidates":
                        self.now["masses"] += not (args[1].unfiltered or args[1].no_whole_top_p)
                    if count == "attend_prefix":
                        self.counts["value"]["bytes"] += attended(*args)
                if tokens is not None:
                    self.now["tokens"] += len(tokens(*args))
                return function(*args, **kwargs)

        return call


def moved(name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that an operator reads and writes: of a table that it picks from or writes into, those entries alone."""

    def tensors(*given: Any) -> list[torch.Tensor]:
        return [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]

    if name in PICKS:
        touched = tensors(args[1:], kwargs, out, out)  # what comes out was read
    elif name in PUTS:
        read = tensors(args[1:], kwargs)
        touched = [*read, read[-1]]  # what goes in is written
    else:
        touched = tensors(args, kwargs, out)
    return sum(t.numel() * t.element_size() for t in touched)


def attended(query: torch.Tensor, rows: Any, k_cache: torch.Tensor, v_cache: torch.Tensor, _: float) -> int:
    """Bytes of `attend_prefix`: queries, results, and each key and value once."""
    read = int(rows.lengths.sum()) + rows.own.numel()
    slot = sum(cache[0].numel() * cache.element_size() for cache in (k_cache, v_cache))
    return 2 * query.numel() * query.element_size() + read * (slot + rows.requests.element_size())


@contextmanager
def recording(engine: InProcess) -> Iterator[Recorder]:
    """Take hold of the plug-in's and the kernels' functions."""
    from lenvm_sglang import attention, forwards, fused, lookahead, model, processor

    recorder = Recorder()
    worker, steering = engine.worker, engine.processor
    with ExitStack() as stack:
        for name in ("follow", "steer", "watch"):
            stack.enter_context(engine.replaced(steering, name, recorder.wrapped(getattr(steering, name), "ours")))
        sampler = engine.runner.sampler
        stack.enter_context(engine.replaced(sampler, "forward", recorder.wrapped(sampler.forward, "sampler")))
        tokens = {"replay": lambda *given: given[2].flatten()}
        for owner, name in forwards_of(worker):
            one = recorder.wrapped(
                getattr(owner, name), "value", "forwards", tokens.get(name, lambda batch, *_: batch.input_ids)
            )
            stack.enter_context(engine.replaced(owner, name, one))
        for module, name, inside in (
            (forwards, "place_candidates", ""),
            (fused, "place_candidates", ""),
            (fused, "tilt_sample", "draw"),
            (attention, "attend_prefix", "attend_prefix"),
            (processor, "build_candidates", ""),
            (processor, "tilt_sample", ""),
            (model, "value_head", "value_head"),
            (lookahead, "lookahead_scores", ""),
        ):
            kernel = recorder.wrapped(getattr(module, name), inside or "kernels", inside or name)
            stack.enter_context(mock.patch.object(module, name, kernel))
        for name in METHODS:
            original = getattr(torch.Tensor, name)

            def noted(self: Any, *args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
                # an operator that it calls would be a second wait
                recorder.wait(f"Tensor.{_name}")
                with torch.utils._python_dispatch._disable_current_modes():
                    return _original(self, *args, **kwargs)

            stack.enter_context(mock.patch.object(torch.Tensor, name, noted))
        try:
            from triton.runtime.jit import JITFunction

            run = JITFunction.run

            def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
                recorder.now["launches"] += 1
                return run(self, *args, **kwargs)

            stack.enter_context(mock.patch.object(JITFunction, "run", launched))
        except ImportError:
            pass
        stack.enter_context(recorder)
        yield recorder


def count(engine: InProcess, rows: int, context: int, kind: str) -> tuple[Recorder, int]:
    """Record decode steps in the middle of an answer; returns the recorder and how many steps they were."""
    sampling = SAMPLING.get(kind, {})
    steps, tokens, warm = 0, 10, 4
    with recording(engine) as recorder:
        # the first steps of a batch write tables and fill caches

        def at_step(batch: Any) -> None:
            nonlocal steps, warm
            if not batch.forward_mode.is_decode():
                return
            if warm:
                warm -= 1
                recorder.counts.clear()
                recorder.waits.clear()
            else:
                steps += 1

        g = torch.Generator().manual_seed(1)
        prompts = torch.randint(2, engine.vocabulary, (rows, context), generator=g).tolist()
        engine.run([engine.request(p, tokens, FIELDS[kind], temperature=1.0, **sampling) for p in prompts], at_step)
    # the step at which the counts were cleared last is in them
    return recorder, steps + 1


def answers(engine: InProcess, kind: str) -> list[list[int]]:
    """Greedy answers to prompts of several lengths, as many as a graph has rows."""
    g = torch.Generator().manual_seed(2)
    prompts = [torch.randint(2, engine.vocabulary, (n,), generator=g).tolist() for n in (3, 17, 9, 5)]
    requests = [engine.request(p, 8, FIELDS[kind], temperature=0.0) for p in prompts]
    found: dict[str, Any] = {}
    # the host drops its requests when they end, so hold them
    engine.run(requests, lambda batch: found.update({req.rid: req for req in batch.reqs}))
    return [list(found[r.rid].output_ids) for r in requests]


def report(table: Table, engine: InProcess, provider: str, kind: str, rows: int, context: int, width: int) -> None:
    recorder, steps = count(engine, rows, context, kind)
    ours, value, kernels = (recorder.counts[p] for p in ("ours", "value", "kernels"))
    within = [recorder.counts[name] for name in INSIDE]
    replaced = provider != "ours" or torch.cuda.is_available()
    launches = ours["launches"] + (sum(KERNELS[k] * kernels[k] for k in KERNELS) if replaced else kernels["launches"])
    inside = sum(INSIDE[n] * recorder.counts[n][n] if replaced else recorder.counts[n]["launches"] for n in INSIDE)
    waits = ours["waits"] + value["waits"]
    if not replaced:  # a stand-in for a kernel may ask what a kernel need not
        waits += kernels["waits"] + sum(phase["waits"] for phase in within)
    # a stand-in for the attention reads a prefix for each candidate: `attended` counts what the kernel reads
    forward_bytes = value["bytes"] + recorder.counts["value_head"]["bytes"]
    found = {
        "value forwards": value["forwards"] / steps,
        "value tokens per row": value["tokens"] / steps / rows,
        "waits of ours": waits / steps,
        "launches of ours outside the value forward": launches / steps,
        "launches of the host's sampler": recorder.counts["sampler"]["launches"] / steps,
        "launches of the value forward": (value["launches"] + inside) / steps,
        "bytes of ours per token": (ours["bytes"] + kernels["bytes"]) / steps / rows,
        "bytes of the value forward per token": forward_bytes / steps / rows,
    }
    sizes = f"B={rows} K={width} L={context} {kind}"
    for name, figure in found.items():
        table.add(name, provider, sizes, [figure])
    print(f"{provider}, {sizes}: " + ", ".join(f"{name} {figure:.6g}" for name, figure in found.items()))
    for where, times in Counter(recorder.waits).most_common(8):
        print(f"    waits at {where}, {times / steps:g} a step")
    if kind != "values" and found["value tokens per row"] > 1:
        table.add("value forwards", "two forwards", sizes, [2])
        table.add("value tokens per row", "two forwards", sizes, [found["value tokens per row"] + 1])
        tokens = found["value tokens per row"]
        ratio = f"value tokens, two forwards/ours {(tokens + 1) / tokens:.3f}, forwards 2/{found['value forwards']:g}"
        print(f"    {ratio}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="one small size")
    parser.add_argument("--base", default="tiny", help="shape of the base model (benchmarks/pairs.py)")
    parser.add_argument("--value", default="tiny", help="shape of the value model")
    parser.add_argument("--pair", type=Path, nargs=2, metavar=("BASE", "LENVM"), help="directories, not made-up models")
    parser.add_argument("--candidates", type=int, default=16, help="K")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/value_step.csv"), help="CSV file to write")
    options = parser.parse_args(arguments)
    quiet()
    rows, contexts = ((2,), (20,)) if options.dry else ((1, 8, 32), (128, 1024))
    with tempfile.TemporaryDirectory() as folder, Table(options.out) as table:
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        flags = ["--lenvm-max-candidates", str(options.candidates)]
        if options.pair:
            pair = tuple(options.pair)
            rows, contexts = (8,), (128,)
        else:
            pair = make_pair(Path(folder), options.base, options.value, max(contexts) + 64, dtype, 512)
            flags += ["--load-format", "dummy"]
        if not torch.cuda.is_available():
            flags += ["--max-total-tokens", str(max(4, *rows) * (max(contexts) + 64))]
        engine = InProcess(*pair, flags, most=max(4, *rows))
        for batch in rows:
            for context in contexts:
                for kind in ("posterior",) if options.dry or options.pair else FIELDS:
                    report(table, engine, "ours", kind, batch, context, options.candidates)
        if torch.cuda.is_available():
            if not options.pair:
                with without_graphs(engine):
                    without = [answers(engine, kind) for kind in FIELDS]
                graphs = engine.worker.candidates.graphs
                if graphs is None or without != [answers(engine, kind) for kind in FIELDS]:
                    raise SystemExit("value_step: no CUDA graphs, or they give different tokens; see the log.")
                print(f"{len(graphs)} CUDA graphs of the value step; same tokens without them")
        elif not options.pair:
            said = [answers(engine, kind) for kind in FIELDS]
            from lenvm_sglang.fused import FusedForward

            engine.worker.waits_for_nobody = False
            engine.worker.candidates = FusedForward(engine.worker)
            if said != [answers(engine, kind) for kind in FIELDS]:
                raise SystemExit("value_step: the device path and the CPU's path give different tokens.")
            for provider in ("ours, device path", "ours, device path, graphs"):
                if provider.endswith("graphs"):
                    engine.worker.candidates.capture(again)
                    if said != [answers(engine, kind) for kind in FIELDS]:
                        raise SystemExit("value_step: the path of graphs and the CPU's path give different tokens.")
                for kind in FIELDS:
                    report(table, engine, provider, kind, rows[-1], contexts[0], options.candidates)
    print(f"in {options.out}")


if __name__ == "__main__":
    main()
