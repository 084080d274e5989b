"""Prompt files: one JSON object a line with `id`, `messages` and whatever else should travel to the samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lenvm.sampling.errors import SamplingError


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: unique in its file.
        messages: chat messages, the last of them the user's.
        meta: the line's other keys, kept under "meta" in every sample of it.
    """

    id: str
    messages: list[dict[str, Any]]
    meta: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Read and check a prompt file.

    Args:
        path: JSONL file.
        limit: only the first so many.

    Raises:
        SamplingError: for a missing or empty file, a line that is no prompt, or an id that occurs twice.
    """
    if not path.is_file():
        raise SamplingError(f"there is no prompt file {path}; give a JSONL file with `id` and `messages` on each line.")
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(prompts) >= limit:
                break
            if not line.strip():
                continue
            prompt = _prompt(line, f"{path}, line {number}")
            if prompt.id in seen:
                raise SamplingError(
                    f"{path}, line {number} repeats the id {prompt.id!r} of line {seen[prompt.id]}; ids must be unique."
                )
            seen[prompt.id] = number
            prompts.append(prompt)
    if not prompts:
        raise SamplingError(f"{path} holds no prompt; give a JSONL file with `id` and `messages` on each line.")
    return prompts


def _prompt(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SamplingError(f"{where} is not JSON ({error.msg}); repair or remove it.") from None
    if not isinstance(row, dict) or "id" not in row or "messages" not in row:
        got = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise SamplingError(f"{where} must be an object with `id` and `messages`, got {got}.")
    messages = row["messages"]
    good = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in messages)
    if not good or not messages:
        raise SamplingError(f"{where}: `messages` must be a list of objects with `role` and `content`, not empty.")
    if messages[-1]["role"] == "assistant":
        raise SamplingError(f"{where}: the last message is the assistant's; a prompt must end before the answer.")
    return Prompt(str(row["id"]), messages, {k: v for k, v in row.items() if k not in ("id", "messages")})


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Of ids and messages: what decides the samples."""
    text = json.dumps([[p.id, p.messages] for p in prompts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sample_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Seed of one completion, 31 bits: a function of the run's seed, the prompt and the sample's number alone, so that
    neither the order of requests nor an interruption changes what is drawn."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
