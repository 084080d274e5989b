"""Tokens a second, guided and unguided, on the same server at the same concurrency."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from lenvm.evaluation.client import Asker, run_together
from lenvm.evaluation.data import NaturalPrompt
from lenvm.evaluation.plan import POSTERIOR, Request, natural_median, stable_seed

REQUESTS = 96
"""Most requests of a block: what a minute on a CPU allows."""
REPEATS = 4
"""How often a block asks a prompt at most; oftener, and it would time the prefix cache."""


def block_size(concurrency: int, prompts: int) -> int:
    """Requests of a block: two for each in flight, within the limits."""
    return min(2 * concurrency, REQUESTS, REPEATS * prompts)


def in_flight(concurrency: int, prompts: int) -> int:
    """How many requests a block really has in flight at a wanted concurrency."""
    return min(concurrency, block_size(concurrency, prompts))


@dataclass(frozen=True)
class Block:
    """One timed block of requests.

    Attributes:
        guided: with a length target or without.
        tokens: completion tokens received.
        seconds: from the first request to the last answer.
    """

    guided: bool
    tokens: int
    seconds: float


async def measure_speed(
    asker: Asker, prompts: Sequence[NaturalPrompt], rounds: int = 2, requests: int | None = None, seed: int = 0
) -> list[Block]:
    """Alternate blocks of unguided and guided requests, nothing else in flight.

    Both ask the same prompts; the guided ones aim at each prompt's median length, so that answers are equally long.
    A warm-up of one request per slot comes first and is not counted.

    Args:
        asker: an entered Asker.
        prompts: taken in turn.
        rounds: blocks of each kind.
        requests: requests a block; default: `block_size`.
        seed: of the sampling.

    Returns:
        2 * rounds blocks in the order in which they ran.
    """
    requests = requests or block_size(asker.settings.concurrency, len(prompts))
    chosen = [prompts[i % len(prompts)] for i in range(requests)]
    for guided in (False, True):
        await _block(asker, chosen[: asker.settings.concurrency], guided, "warm-up", seed)
    blocks = []
    for k in range(rounds):
        # the second round runs in the opposite order, so that a drift of the machine cancels
        for guided in (False, True) if k % 2 == 0 else (True, False):
            began = time.perf_counter()
            tokens = await _block(asker, chosen, guided, k, seed)
            blocks.append(Block(guided, tokens, time.perf_counter() - began))
    return blocks


async def _block(asker: Asker, prompts: Sequence[NaturalPrompt], guided: bool, label: object, seed: int) -> int:
    requests = []
    for i, prompt in enumerate(prompts):
        target = natural_median(prompt)
        fields = POSTERIOR.request_fields("equal_to", target) if guided else {}
        draw = stable_seed(seed, "speed", guided, label, i)
        requests.append((Request("speed", str(guided), prompt.id, target, i, draw, fields), prompt))
    waiting = iter(requests)
    tokens = 0

    async def work() -> None:
        nonlocal tokens
        for request, prompt in waiting:
            answer = await asker.ask(request, prompt.messages)
            tokens += answer.length  # not in one line: `tokens` would be read before the wait, and counts lost

    await run_together([work() for _ in range(min(asker.settings.concurrency, len(requests)))])
    return tokens
