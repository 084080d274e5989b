"""Answers of a scheduler in this process, by the CPU's path or by a GPU's:
`python -m tests.sglang.paths BASE LENVM [fused | graphs | host | parts | triton] [few] [images] [broken | unfit]`.

With one of these words and TRITON_INTERPRET=1 every kernel of ours runs as on a GPU, in Triton's interpreter: launches,
buffers and bookkeeping are those of a GPU. `fused` is our own attention; `graphs` replays its forward and the draw on
the memory of CUDA graphs, by running them again; `host` is the host's attention, and `parts` leaves room for so few
candidates in its forward that the batch takes several. `triton` is the host's attention with its kernels for a GPU, in
the interpreter too, for the base model and for all forwards of the value model; that takes so long that it is for `few`
answers, and `images` is for models that could read some. With `broken` the steered ones are asked alone, and after its
first token the value model raises for one of them. With `unfit` our attention on a CPU raises from the start. Prints
one JSON list of token lists.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.inprocess import InProcess, again, quiet
from lenvm.guidance import Scores
from lenvm_sglang import forwards, fused, processor
from lenvm_sglang.attention import AttentionError, SharedPrefixBackend
from lenvm_sglang.graphs import buckets
from tests.kernels.checks import quick
from tests.sglang.models import prompts

assert quick

ASKED: list[dict[str, Any]] = [
    {"length_target": 7},
    {"length_target": 12, "length_mode": "at_most"},
    {"length_target": 9, "length_mode": "at_least", "length_strict": True},
    {"length_target": 15, "length_control": "hard"},
    {"length_target": 9, "length_control": "soft"},
    {"length_target": 11, "length_strict": True},
    {"length_bias": -4.0},
    {"return_length_values": True},
    {},
]
STEERED = 7
"""How many of them, from the first."""
BROKEN = 1
"""Which of them the value model may raise for."""


def ask(engine: InProcess, which: Iterable[int], tokens: int = 24) -> list[list[int]]:
    """Answers of at most so many tokens to some of the requests, all at once."""
    found: dict[str, Any] = {}

    def hold(batch: Any) -> None:  # the host drops its requests when they end
        found.update({req.rid: req for req in batch.reqs})

    requests = []
    for i in which:
        sampling = {"temperature": 1.0, "sampling_seed": i} if i < STEERED else {"temperature": 0.0}
        requests.append(engine.request(prompts(len(ASKED), 4)[i], tokens, ASKED[i] or None, **sampling))
        requests[-1].sampling_params.ignore_eos = False
    engine.run(requests, hold)
    return [list(found[r.rid].output_ids) for r in requests]


def answers(engine: InProcess) -> list[list[int]]:
    """All at once, so that steered, watched and plain rows share batches; then the steered ones alone with each other,
    and some of them alone."""
    return [answer for which in (range(len(ASKED)), range(STEERED), [0], [5]) for answer in ask(engine, which)]


def few(engine: InProcess) -> list[list[int]]:
    """A steered row and a watched one, then steered ones alone."""
    return ask(engine, [0, STEERED], 5) + ask(engine, [0, 5], 3)


def raises_for_one(engine: InProcess) -> None:
    """Break the value model for `ASKED[BROKEN]`, from its second token on."""
    original = engine.worker.score

    def score(batch: Any, place: Any, *args: Any, **kwargs: Any) -> Scores:
        targets = [state.request.target for state in place.states]
        if batch.forward_mode.is_decode() and ASKED[BROKEN]["length_target"] in targets:
            raise RuntimeError("out of memory, or so")
        scores: Scores = original(batch, place, *args, **kwargs)
        return scores

    engine.worker.score = score


def main() -> None:
    quiet()
    base, lenvm, *words = sys.argv[1:]
    flags = ["--max-total-tokens", "4096"]
    if "triton" in words:
        flags += ["--attention-backend", "triton", "--triton-attention-num-kv-splits", "2"]
    if "images" in words:
        flags += ["--mm-attention-backend", "sdpa"]
    if "unfit" in words:
        mock.patch.object(SharedPrefixBackend, "attend", side_effect=AttentionError("the model asks for more")).start()
    engine = InProcess(Path(base), Path(lenvm), flags, most=16)
    if set(words) - {"few", "images", "unfit", "broken"}:
        engine.worker.waits_for_nobody = False
        if "parts" in words:
            forwards.VIRTUAL_ROWS = 40
        worker = engine.worker
        ours = {"fused", "graphs"} & set(words)
        reader: Any = None
        if worker.ahead is None:
            reader = worker.candidates = (fused.FusedForward if ours else forwards.HostForward)(worker)
        elif not worker.reads_base and ours:
            reader = worker.tokens = fused.TokenForward(worker)
        if reader is not None:
            reader.probe()
        if "graphs" in words:
            # a server makes its graphs before it makes this
            with mock.patch("sglang.srt.managers.mm_schedule.embedding_cache", None):
                reader.capture(again)
            assert len(reader.graphs) == len(buckets(worker.request_rows, reader.widths))
            with (
                mock.patch.object(processor, "tilt_sample", wraps=processor.tilt_sample) as launched,
                mock.patch.object(reader, "bring", wraps=reader.bring) as brought,
            ):
                ask(engine, [0, STEERED - 1], 3)
            assert brought.called, "no graph was replayed"
            assert worker.ahead is not None or not launched.called, "a token was drawn outside the graph"
    if "broken" in words:
        raises_for_one(engine)
        print(json.dumps(ask(engine, range(STEERED))))
        return
    print(json.dumps(few(engine) if "few" in words else answers(engine)))


if __name__ == "__main__":
    main()
