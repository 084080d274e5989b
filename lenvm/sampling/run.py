"""Draw what is missing: bounded concurrency, one row written as soon as it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from lenvm.sampling.errors import SamplingError
from lenvm.sampling.images import path_from
from lenvm.sampling.log import CompletionLog
from lenvm.sampling.pool import Source
from lenvm.sampling.prompts import Prompt, prompts_hash, sample_seed
from lenvm.sampling.servers import Completion, api_key_header
from lenvm.sampling.settings import SamplingSettings
from lenvm.sampling.shards import Shard
from lenvm.sampling.transport import RequestFailedError

MAX_REFUSALS = 20
"""So many failed requests without a single success, and the whole run is given up."""

Notify = Callable[[int, int, int], None]
"""Called with completions there, completions wanted, and tokens drawn in this run."""


@dataclass
class SamplingResult:
    """What a run did.

    Attributes:
        drawn: completions drawn now.
        kept: completions that were there before.
        repaired: bytes of a torn last line that were cut off.
        failed: prompt id -> why its request failed after all attempts.
        notes: what a person should know about the server.
    """

    drawn: int = 0
    kept: int = 0
    repaired: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def sample(
    prompts: Sequence[Prompt],
    out: Path,
    server: Source,
    settings: SamplingSettings,
    notify: Notify | None = None,
    shard: Shard | None = None,
) -> SamplingResult:
    """Draw the completions of all prompts that `out` does not have yet.

    Args:
        prompts: what to complete.
        out: JSONL file; taken up where it stands.
        server: who draws.
        settings: how.
        notify: progress.
        shard: draw only this part of the prompts.

    Raises:
        SamplingError: if the shard holds no prompt, the server cannot be used or is gone, or `out` cannot be continued.
            What was drawn is kept.
    """
    # of all prompts, whichever part of them is drawn here
    parameters: dict[str, Any] = {"prompts": prompts_hash(prompts)}
    if shard is not None:
        whole, prompts = len(prompts), shard.of_list(prompts)
        if not prompts:
            raise SamplingError(f"shard {shard.index}/{shard.of} of {whole} prompts holds none; use fewer shards.")
        parameters["shard"] = {"index": shard.index, "of": shard.of, "prompts": len(prompts)}
    return asyncio.run(_sample(prompts, out, server, settings, notify or (lambda *_: None), parameters))


async def _sample(
    prompts: Sequence[Prompt],
    out: Path,
    server: Source,
    settings: SamplingSettings,
    notify: Notify,
    parameters: dict[str, Any],
) -> SamplingResult:
    limits = httpx.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
    timeout = httpx.Timeout(settings.timeout, connect=min(10.0, settings.timeout))
    async with httpx.AsyncClient(limits=limits, timeout=timeout, headers=api_key_header()) as client:
        await server.open(client, next((p for p in prompts if p.images), prompts[0]))
        with CompletionLog(out, {**parameters, **_parameters(server, settings)}) as log:
            result = SamplingResult(kept=len(log.done), repaired=log.repaired, notes=list(server.notes))
            total = len(prompts) * settings.n
            notify(len(log.done), total, 0)
            await _draw_missing(prompts, client, server, settings, log, result, notify)
            result.notes = list(server.notes)  # a server may have gone away meanwhile
            if len(log.done) == total:
                log.finish([p.id for p in prompts])
    return result


def _parameters(server: Source, settings: SamplingSettings) -> dict[str, Any]:
    """What must be the same when a file is continued. The address and the concurrency may change."""
    return {
        "model": server.model,
        "n": settings.n,
        **settings.distribution(),
        "seed": settings.seed,
        "token_ids": server.token_ids,
        "seeds_honoured": server.seeds_honoured,
    }


def _groups(
    prompts: Sequence[Prompt], n: int, size: int, done: set[tuple[str, int]]
) -> Iterator[tuple[Prompt, list[int]]]:
    for prompt in prompts:
        missing = [k for k in range(n) if (prompt.id, k) not in done]
        for start in range(0, len(missing), size):
            yield prompt, missing[start : start + size]


async def _draw_missing(
    prompts: Sequence[Prompt],
    client: httpx.AsyncClient,
    server: Source,
    settings: SamplingSettings,
    log: CompletionLog,
    result: SamplingResult,
    notify: Notify,
) -> None:
    size = min(server.group, settings.concurrency)
    total, before = len(prompts) * settings.n, log.tokens
    # a task exists only once it may run: thousands of prompts never become thousands of waiting requests
    slots = asyncio.Semaphore(max(1, settings.concurrency // size))
    model, distribution = server.model, settings.distribution()
    fatal: list[SamplingError] = []

    async def one(prompt: Prompt, samples: list[int]) -> None:
        try:
            completions = await server.draw(client, prompt, samples)
        except RequestFailedError as error:
            result.failed[prompt.id] = str(error)
            if error.unreachable and not await server.alive(client):
                fatal.append(
                    SamplingError(f"{server.url} cannot be reached any more: {error}; what was drawn is kept.")
                )
            elif not result.drawn and len(result.failed) >= MAX_REFUSALS:
                fatal.append(SamplingError(f"the first {MAX_REFUSALS} prompts all failed, the last with: {error}."))
            return
        finally:
            slots.release()
        for k, completion in zip(samples, completions, strict=True):
            log.write(_row(prompt, k, completion, model, distribution, settings.seed, log.path.parent))
        result.drawn += len(completions)
        notify(len(log.done), total, log.tokens - before)

    running: set[asyncio.Task[None]] = set()
    try:
        for prompt, samples in _groups(prompts, settings.n, size, set(log.done)):
            await slots.acquire()
            for task in [t for t in running if t.done()]:
                running.discard(task)
                task.result()
            if fatal:
                raise fatal[0]
            running.add(asyncio.create_task(one(prompt, samples)))
        await asyncio.gather(*running)
        if fatal:
            raise fatal[0]
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _row(
    prompt: Prompt, k: int, completion: Completion, model: str, distribution: dict[str, Any], seed: int, folder: Path
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt_id": prompt.id,
        "messages": prompt.messages,
        "prompt_token_ids": completion.prompt_token_ids,
        "completion": completion.text,
        "completion_token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "seed": sample_seed(seed, prompt.id, k),
        "sample": k,
        "model": model,
        "sampling": distribution,
        "token_ids": "retokenised" if completion.retokenised else "server",
        "meta": prompt.meta,
    }
    if prompt.images:
        row["images"] = [path_from(image.path, folder) for image in prompt.images]
        row["image_sha256"] = [image.sha256 for image in prompt.images]
    if completion.retokenised:
        row["counted_tokens"] = completion.counted
    return row
