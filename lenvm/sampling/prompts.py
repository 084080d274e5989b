"""Prompts: `id`, `messages` and whatever else should travel to the samples, from any source of rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lenvm.instructions import instructed
from lenvm.sampling.errors import SamplingError
from lenvm.sampling.images import PLACEHOLDER, PromptImage, place_images, read_images, shown_images
from lenvm.sampling.sources import read_source

FIELDS = ("id", "messages", "prompt", "system", "images")
"""What a column map can name."""
SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Who speaks in messages with `from` and `value`, and the role that is meant."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: unique in its file.
        messages: chat messages, the last of them the user's; a part `{"type": "image"}` for each image.
        meta: the row's other keys, kept under "meta" in every sample of it.
        images: in the order of their places in the messages.
    """

    id: str
    messages: list[dict[str, Any]]
    meta: dict[str, Any] = field(default_factory=dict)
    images: tuple[PromptImage, ...] = ()

    def identity(self) -> list[Any]:
        """What a server is asked: two prompts of the same identity are one, whatever their ids and file names."""
        return [self.messages, *([[image.sha256 for image in self.images]] if self.images else [])]


@dataclass(frozen=True)
class Reading:
    """How rows become prompts.

    Attributes:
        columns: our name -> the source's column, for `id`, `messages`, `prompt` (a text, which becomes the user's
            message), `system` and `images`. Without a column for `id` rows are numbered.
        instruction: put before a `prompt`, or before the first user message of a conversation, and an empty line.
        first_turn: keep a conversation up to its first user message (WildChat).
        deduplicate: leave out prompts whose messages, with the same images, occurred before.
        split: of a dataset directory; a file is read whole.
        meta: columns that travel to the samples; None for all that are not mapped.
        absent: a text that stands where a data set leaves its questions out; such rows are refused.
        media: folder that paths of images are relative to; default: that of the prompt file, or the dataset directory.
        images: folder where images are written to that rows hold as bytes; without one they are refused.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    instruction: str = ""
    first_turn: bool = False
    deduplicate: bool = False
    split: str | None = None
    meta: Sequence[str] | None = None
    absent: str | None = None
    media: Path | None = None
    images: Path | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.columns) - set(FIELDS))
        if unknown:
            raise SamplingError(f"a column map knows {', '.join(FIELDS)}, got {unknown[0]!r}.")
        if "messages" in self.columns and "prompt" in self.columns:
            raise SamplingError("a column map names either `messages` or `prompt`, got both.")
        if self.media is not None and not self.media.is_dir():
            raise SamplingError(f"--media-dir must be the folder of the images, got {self.media}, which is none.")


def read_prompts(path: Path, limit: int | None = None, reading: Reading | None = None) -> list[Prompt]:
    """Read and check prompts.

    Args:
        path: JSONL or parquet file, or dataset directory.
        limit: only the first so many (duplicates that are left out do not count).
        reading: how rows become prompts; default: `id` and `messages` as they are.

    Raises:
        SamplingError: for a missing or empty source, a row that is no prompt, an image that cannot be opened, or an id
            that occurs twice.
    """
    how = reading or Reading()
    if how.media is None:
        how = replace(how, media=path if path.is_dir() else path.parent)
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    texts: set[bytes] = set()
    for number, (where, row) in enumerate(read_source(path, how.split)):
        if limit is not None and len(prompts) >= limit:
            break
        prompt = _prompt(row, where, how, number)
        if how.deduplicate:
            key = hashlib.blake2b(json.dumps(prompt.identity(), sort_keys=True).encode(), digest_size=16).digest()
            if key in texts:
                continue
            texts.add(key)
        if prompt.id in seen:
            raise SamplingError(f"{where} repeats the id {prompt.id!r} of {seen[prompt.id]}; ids must be unique.")
        seen[prompt.id] = where.rpartition(", ")[2]
        prompts.append(prompt)
    if not prompts:
        raise SamplingError(f"{path} holds no prompt; give a JSONL file with `id` and `messages` on each line.")
    return prompts


def _prompt(row: Any, where: str, how: Reading, number: int) -> Prompt:
    if not isinstance(row, dict):
        raise SamplingError(f"{where} must be an object with `id` and `messages`, got {type(row).__name__}.")
    columns = {"id": "id", **({} if "prompt" in how.columns else {"messages": "messages"}), **how.columns}
    numbered = how.columns and "id" not in how.columns and "id" not in row
    missing = [c for name, c in columns.items() if c not in row and not (name == "id" and numbered)]
    if missing:
        raise SamplingError(
            f"{where} must be an object with {' and '.join(f'`{c}`' for c in columns.values())}, got "
            f"{', '.join(sorted(row))}; --columns maps other names."
        )
    messages = _messages(row, columns, how, where)
    if "system" in how.columns and row[how.columns["system"]]:
        messages = [{"role": "system", "content": str(row[how.columns["system"]])}, *messages]
    column = columns.get("images", "images")
    images: tuple[PromptImage, ...] = ()
    if column in row:
        images = read_images(row[column], where, column, how.media or Path(), how.images)
    messages = place_images(messages, len(images) if column in row else None, where)
    if how.first_turn and "prompt" not in columns:
        messages = _first_turn(messages, columns["messages"], where)
        images = images[: shown_images(messages)]  # of later turns
    mapped = (*columns.values(), column)
    meta = {k: v for k, v in row.items() if (k not in mapped if how.meta is None else k in how.meta)}
    return Prompt(str(number) if numbered else str(row[columns["id"]]), messages, _plain(meta, where), images)


def _messages(row: dict[str, Any], columns: Mapping[str, str], how: Reading, where: str) -> list[dict[str, Any]]:
    if "prompt" in columns:
        text = row[columns["prompt"]]
        if not isinstance(text, str) or not text.strip():
            raise SamplingError(f"{where}: `{columns['prompt']}` must be a text, got {text!r}.")
        if text.strip() == how.absent:
            raise SamplingError(
                f"{where}: `{columns['prompt']}` is {text!r}: the data set comes without its questions; fill them in "
                "as its card describes, and sample from the result."
            )
        return [{"role": "user", "content": _behind_images(how.instruction, text)}]
    name, messages = columns["messages"], _sharegpt(row[columns["messages"]])
    good = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in messages)
    if not good or not messages:
        raise SamplingError(f"{where}: `{name}` must be a list of objects with `role` and `content`, not empty.")
    if messages[-1]["role"] == "assistant" and not how.first_turn:
        raise SamplingError(
            f"{where}: the last message is the assistant's; a prompt must end before the answer "
            "(--first-turn keeps the first question alone)."
        )
    return _led(messages, how.instruction, where)


def _sharegpt(messages: Any) -> Any:
    """Messages with `from` and `value` as ones with `role` and `content`; all others as they are."""
    if not isinstance(messages, list):
        return messages
    return [
        {"role": SHAREGPT[m["from"]], "content": m["value"]}
        if isinstance(m, dict) and m.get("from") in SHAREGPT and "value" in m
        else m
        for m in messages
    ]


def _led(messages: list[dict[str, Any]], instruction: str, where: str) -> list[dict[str, Any]]:
    """The messages with the instruction before the first question."""
    if not instruction:
        return messages
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if first is None:
        raise SamplingError(f"{where} has no message of the user to put the instruction before.")
    content = messages[first]["content"]
    if isinstance(content, list):
        content = [{"type": "text", "text": instructed(instruction, "")}, *content]
    else:
        content = _behind_images(instruction, str(content))
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]


def _behind_images(instruction: str, text: str) -> str:
    """The question after its instruction; images that it begins with stay first."""
    images = re.match(rf"(?:{PLACEHOLDER}\s*)*", text)
    end = images.end() if images else 0
    return text[:end] + instructed(instruction, text[end:])


def _first_turn(messages: list[dict[str, Any]], name: str, where: str) -> list[dict[str, Any]]:
    ends = [i for i, m in enumerate(messages) if m["role"] == "user"]
    if not ends:
        raise SamplingError(f"{where}: `{name}` has no message of the user.")
    # a dataset keeps dates, languages and the like in each message; a chat template wants role and content
    return [{"role": m["role"], "content": m["content"]} for m in messages[: ends[0] + 1]]


def _plain(meta: dict[str, Any], where: str) -> dict[str, Any]:
    """Only what JSON can hold: dates of a parquet file become text; bytes are refused."""
    try:
        return dict(json.loads(json.dumps(meta, default=_text)))
    except TypeError as error:
        raise SamplingError(
            f"{where}: {error}; leave that column out of the file, or map it with --columns images=NAME if it is one "
            "of images."
        ) from None


def _text(value: Any) -> str:
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise TypeError(f"a value of type {type(value).__name__} cannot travel to the samples")


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Of ids, messages and images: what decides the samples. The digest is of one JSON list, made piece by piece."""
    digest = hashlib.sha256(b"[")
    for i, p in enumerate(prompts):
        text = json.dumps([p.id, *p.identity()], sort_keys=True, ensure_ascii=False)
        digest.update(f"{', ' if i else ''}{text}".encode())
    digest.update(b"]")
    return digest.hexdigest()


def sample_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Seed of one completion, 31 bits: a function of the run's seed, the prompt and the sample's number alone, so that
    neither the order of requests nor an interruption changes what is drawn."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
