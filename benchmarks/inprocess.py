"""SGLang's scheduler in this process: the same code as in a server, without HTTP, tokenizer and detokenizer, so that a
step can be timed, counted and taken apart. One a process."""

from __future__ import annotations

import os
import sys
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import is_dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

CPU_FLAGS = ("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32")


class _Finished(Exception):  # noqa: N818, it is no error
    """Leaves the scheduler's loop."""


class InProcess:
    """A scheduler with or without a length value model.

    Args:
        base, lenvm: model directories; no LenVM: None.
        flags: further flags of the server.
        most: largest batch.
    """

    def __init__(self, base: Path, lenvm: Path | None, flags: Sequence[str] = (), most: int = 128) -> None:
        cpu = not torch.cuda.is_available()
        if cpu:
            os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import PortArgs, prepare_server_args

        load_plugins()
        from sglang.srt.entrypoints.engine import _set_envs_and_config
        from sglang.srt.runtime_context import SpawnRanks, publish

        words = ["--model-path", str(base), "--log-level", "warning", "--max-running-requests", str(most)]
        words += ["--disable-radix-cache", *(CPU_FLAGS if cpu else ())]
        if lenvm is not None:
            words += ["--lenvm-model", str(lenvm)]
        args = prepare_server_args([*words, *flags])
        args.resolve_once()
        _set_envs_and_config(args)
        args.check_server_args()
        ports = PortArgs.init_new(args)
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
        from sglang.srt.managers.scheduler import Scheduler

        self.scheduler = Scheduler(args, ports)
        self.scheduler.get_init_info()
        self.runner = self.scheduler.tp_worker.model_runner
        processor = getattr(self.runner, "lenvm_processor", None)
        self.worker = None if processor is None else processor.worker
        self.processor = processor
        self.vocabulary = self.runner.model_config.vocab_size
        self._at_step: Callable[[Any], None] = lambda batch: None
        self._watch_steps()

    def _watch_steps(self) -> None:
        original = self.scheduler.run_batch

        def run_batch(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._at_step(batch)
            return original(batch, *args, **kwargs)

        self.scheduler.run_batch = run_batch

    def request(self, prompt: Sequence[int], tokens: int, fields: dict[str, Any] | None, **sampling: Any) -> Any:
        """A request of exactly `tokens` tokens: stop tokens are not among what it may say."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        params = SamplingParams(max_new_tokens=tokens, ignore_eos=True, custom_params=fields, **sampling)
        params.normalize(None)
        return TokenizedGenerateReqInput(
            rid=uuid.uuid4().hex,
            input_text="",
            input_ids=array("q", prompt),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=params,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
        )

    def run(self, requests: Sequence[Any], at_step: Callable[[Any], None] = lambda batch: None) -> list[float]:
        """Answer requests; `at_step` is called with the batch before each step.

        Returns:
            Seconds of each decode step of the full batch, the loop's own work included.
        """
        scheduler = self.scheduler
        stamps: list[float] = []

        def watch(batch: Any) -> None:
            full = batch.forward_mode.is_decode() and len(batch.reqs) == len(requests)
            if full:
                # not waiting for a GPU: the loop itself waits for the tokens of the step before
                stamps.append(time.perf_counter())
            at_step(batch)

        waiting = list(requests)

        def ingest(*_: Any, **__: Any) -> list[Any]:
            if waiting:
                scheduler.process_input_requests(waiting)
                waiting.clear()
            elif scheduler.is_fully_idle() and scheduler.last_batch is None:
                raise _Finished
            return []

        self._at_step, scheduler.ingest_requests = watch, ingest
        with suppress(_Finished):
            scheduler.run_event_loop()
        return [b - a for a, b in pairwise(stamps)]

    def steps(
        self,
        rows: int,
        context: int,
        tokens: int,
        fields: dict[str, Any] | None,
        seed: int = 0,
        at_step: Callable[[Any], None] = lambda batch: None,
        **sampling: Any,
    ) -> list[float]:
        """Seconds of decode steps of `rows` like requests with random prompts of `context` tokens."""
        g = torch.Generator().manual_seed(seed)
        prompts = torch.randint(2, self.vocabulary, (rows, context), generator=g).tolist()
        return self.run([self.request(p, tokens, fields, **sampling) for p in prompts], at_step)

    @contextmanager
    def replaced(self, owner: Any, name: str, function: Any) -> Iterator[None]:
        """`owner.name` is `function` meanwhile."""
        had = name in vars(owner)
        original = getattr(owner, name)
        setattr(owner, name, function)
        try:
            yield
        finally:
            if had:
                setattr(owner, name, original)
            else:
                delattr(owner, name)


def quiet() -> None:
    """One thread, as the CPU servers of this project run; call before torch has worked."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.setswitchinterval(0.05)


class Step(NamedTuple):
    """Seconds of the decode steps of one size, samples of each.

    Attributes:
        unguided, guided: whole steps.
        base: bare forwards of the base model in unguided steps.
        value: bare forwards of the value model, with its heads.
        interrupted: on a CPU, unguided steps in which nothing is done for as long as a forward of the value model
            takes, less that pause. On a machine whose cores and caches others use too, what the host does next is
            slower by then. The pause comes after the host's draw, which guided steps do not have.
    """

    unguided: list[float]
    guided: list[float]
    base: list[float]
    value: list[float]
    interrupted: list[float]

    @property
    def samples(self) -> dict[str, list[float]]:
        """What was measured, by name."""
        return {name: seconds for name, seconds in self._asdict().items() if seconds}

    @property
    def ratio(self) -> float:
        """Guided over unguided tokens per second."""
        return median(self.unguided) / median(self.guided)

    @property
    def allowed(self) -> float:
        """What it would be if a guided step were an unguided one and a bare forward of the value model."""
        return median(self.unguided) / (median(self.unguided) + median(self.value))

    @property
    def allowed_interrupted(self) -> float | None:
        """The same if the unguided step is one that is interrupted for as long; None if there was none."""
        if not self.interrupted:
            return None
        return median(self.unguided) / (median(self.interrupted) + median(self.value))


def stopwatch(function: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """The function, its seconds added to the last entry of `into`."""
    gpu = torch.cuda.is_available()

    def timed(*args: Any, **kwargs: Any) -> Any:
        if gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        out = function(*args, **kwargs)
        if gpu:
            torch.cuda.synchronize()
        into[-1] += time.perf_counter() - began
        return out

    return timed


def next_step(sums: list[float], batch: Any) -> None:
    """A new last entry for `stopwatch`, at the start of a step."""
    sums.append(0.0)


def then_pause(function: Callable[..., Any], seconds: float, into: list[float]) -> Callable[..., Any]:
    """The function, then a pause that touches no memory, its seconds added to the last entry of `into`."""

    def paused(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            pass
        into[-1] += time.perf_counter() - began
        return out

    return paused


def forwards_of(worker: Any) -> list[tuple[Any, str]]:
    """The methods that are the value model's forward in a decode step, and their owners; an attached head has none."""
    if worker.reads_base:
        return []
    if worker.ahead is not None:
        return [(worker.tokens, "read") if hasattr(worker.tokens, "read") else (worker, "forward")]
    return [(worker.candidates, name) for name in ("run", "replay") if hasattr(worker.candidates, name)]


@contextmanager
def without_graphs(engine: InProcess) -> Iterator[None]:
    """The value forward launch by launch."""
    worker = engine.worker
    forward = getattr(worker, "candidates", getattr(worker, "tokens", None))
    if getattr(forward, "graphs", None) is None:
        yield
    else:
        with engine.replaced(forward, "graphs", None):
            yield


@contextmanager
def again() -> Iterator[Any]:
    """Records a step as a CUDA graph would, but for the graph: to replay is to run it again, on the memory and into the
    memory of the first time."""

    def tensors(outcome: Any) -> list[torch.Tensor]:
        parts = [
            part for leaf in tree_leaves(outcome) for part in (vars(leaf).values() if is_dataclass(leaf) else [leaf])
        ]
        return [part for part in parts if part is not None]

    def record(step: Callable[[], Any]) -> Any:
        outcome = step()

        def replay() -> None:
            for there, fresh in zip(tensors(outcome), tensors(step()), strict=True):
                if there.data_ptr() != fresh.data_ptr():
                    there.copy_(fresh)

        return replay, outcome

    yield record


def measure(
    engine: InProcess, rows: int, context: int, tokens: int, fields: dict[str, Any], repeats: int, **sampling: Any
) -> Step:
    """Decode steps of `rows` requests, unguided and guided in turn, `repeats` times: the machine may be shared."""
    out = Step([], [], [], [], [])
    worker, sampler = engine.worker, engine.runner.sampler
    graphs = engine.runner.decode_cuda_graph_runner
    graphed = torch.cuda.is_available() and graphs is not None
    model, forward = (graphs, "execute") if graphed else (engine.runner.model, "forward")
    for repeat in range(repeats):
        ask = partial(engine.steps, rows, context, tokens, seed=repeat, **sampling)
        # bare forwards in runs of their own: on a GPU timing them means waiting for them
        out.unguided.extend(ask(None)[2:])
        out.guided.extend(ask(fields)[2:])
        base, value, pauses = [0.0], [0.0], [0.0]
        with engine.replaced(model, forward, stopwatch(getattr(model, forward), base)):
            ask(None, at_step=partial(next_step, base))
        with ExitStack() as stack:
            for owner, name in forwards_of(worker):
                stack.enter_context(engine.replaced(owner, name, stopwatch(getattr(owner, name), value)))
            ask(fields, at_step=partial(next_step, value))
        out.base.extend(base[4:])
        out.value.extend(value[4:])
        if torch.cuda.is_available():  # a pause of the host is none of the device
            continue
        with engine.replaced(sampler, "forward", then_pause(sampler.forward, median(value[4:]), pauses)):
            found = ask(None, at_step=partial(next_step, pauses))
        pauses = pauses[-len(found) - 1 : -1]  # of the last decode step there is a pause and no time
        out.interrupted.extend(step - pause for step, pause in zip(found[2:], pauses[2:], strict=True))
    return out


def overhead(
    engine: InProcess, rows: int, context: int, tokens: int, fields: dict[str, Any], repeats: int, **sampling: Any
) -> tuple[list[float], list[float]]:
    """The same with both models mocked: forwards that take no time and always say the same.

    Returns:
        Seconds of unguided and of guided steps; the difference of the medians is what the plug-in itself costs.
    """
    model, worker = engine.runner.model, engine.worker
    value = worker.runner.model
    g = torch.Generator().manual_seed(0)
    device, dtype = engine.runner.device, engine.runner.model_config.dtype
    logits = torch.randn(rows, engine.vocabulary, generator=g).to(device=device, dtype=torch.float32)
    hidden = torch.zeros(rows * worker.width, value.config.hidden_size, device=device, dtype=dtype)
    z = torch.randn(rows * worker.width, generator=g).to(device)
    log_q = torch.randn(rows * worker.width, len(worker.lenvm.bins), generator=g).log_softmax(-1).to(device)
    real, real_forward, real_scores = model.forward, worker.forward, value.scores

    def base_forward(input_ids: Any, positions: Any, batch: Any, **kwargs: Any) -> Any:
        from sglang.srt.layers.logits_processor import LogitsProcessorOutput

        if not batch.forward_mode.is_decode():
            return real(input_ids, positions, batch, **kwargs)
        return LogitsProcessorOutput(next_token_logits=logits[: batch.batch_size].clone())

    def forward(batch: Any, backend: Any) -> Any:
        return hidden[: len(batch.input_ids)] if backend is worker.candidates.backend else real_forward(batch, backend)

    def scores(x: Any, *args: Any) -> Any:
        from lenvm.guidance import Scores

        shape, count = x.shape[:-1], x.shape[:-1].numel()
        if count > len(z):
            return real_scores(x, *args)
        return Scores(z[:count].view(shape), log_q[:count].view(*shape, -1))

    unguided: list[float] = []
    guided: list[float] = []
    with (
        engine.replaced(engine.runner, "decode_cuda_graph_runner", None),
        engine.replaced(model, "forward", base_forward),
        without_graphs(engine),
        engine.replaced(worker, "forward", forward),
        engine.replaced(value, "scores", scores),
    ):
        for repeat in range(repeats):
            ask = partial(engine.steps, rows, context, tokens, seed=repeat, **sampling)
            unguided.extend(ask(None)[2:])
            guided.extend(ask(fields)[2:])
    return unguided, guided
