"""Splitting a file of samples by prompt: all completions of one prompt go to the same part.

Samples of one prompt have related lengths, so a split by rows would let a validation set be known from training. Where
a prompt goes is a function of the prompt and the seed alone: more samples, or more prompts, move none of the old ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lenvm.sampling.errors import SamplingError
from lenvm.sampling.images import carry_images

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Part:
    """One part of a split: its file, and how many prompts and rows went there."""

    path: Path
    prompts: int
    rows: int


def prompt_key(row: Any, where: str) -> bytes:
    """What makes two rows samples of the same prompt: equal token ids, or equal messages where there are no ids, and
    equal images (files of the same name, where the row has no hashes of them).

    Raises:
        SamplingError: if the row has neither.
    """
    if isinstance(row, dict):
        for name in ("prompt_token_ids", "messages"):
            value = row.get(name)
            if isinstance(value, list) and value:
                images = row.get("image_sha256") or row.get("images") or []
                key = [name, value, *([images] if images else [])]
                return json.dumps(key, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    got = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
    raise SamplingError(f"{where} must be an object with `prompt_token_ids` or `messages`, got {got}.")


def place(key: bytes, seed: int) -> float:
    """Where a prompt falls in [0, 1): uniform over prompts, the same on every machine."""
    digest = hashlib.blake2b(key, digest_size=8, key=str(seed).encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def split_samples(
    source: Path, out: Path, validation: float, test: float = 0.0, seed: int = 0, force: bool = False
) -> dict[str, Part]:
    """Write `train.jsonl`, `validation.jsonl` and, if asked for, `test.jsonl`; lines are copied as they are, except
    that paths of images follow where the parts lie in another folder.

    Args:
        source: JSONL file as `lenvm sample` writes it.
        out: directory of the parts.
        validation: share of the prompts, in (0, 1); what a part really gets scatters around its share.
        test: share of the prompts, in [0, 1).
        seed: another seed is another split.
        force: replace files that are there.

    Returns:
        name -> part.

    Raises:
        SamplingError: for shares that leave nothing to train on, a missing or unreadable source, files that are there
            already, or a part without a prompt. Nothing is written then.
    """
    if not (0.0 < validation < 1.0 and 0.0 <= test < 1.0 and validation + test < 1.0):
        raise SamplingError(
            "the shares of validation and test must be between 0 and 1 and leave something to train on, "
            f"got {validation:g} and {test:g}."
        )
    if not source.is_file():
        raise SamplingError(f"there is no file of samples {source}; `lenvm sample` writes one.")
    names = PARTS if test else PARTS[:2]
    files = {name: out / f"{name}.jsonl" for name in names}
    if any(path.resolve() == source.resolve() for path in files.values()):
        raise SamplingError(f"{source} is one of the files to be written; choose another --out.")
    there = [path.name for path in files.values() if path.exists()]
    if there and not force:
        raise SamplingError(f"{out} has {', '.join(there)} already; choose another --out, or add --force.")

    out.mkdir(parents=True, exist_ok=True)
    drafts = {name: path.with_name(path.name + ".part") for name, path in files.items()}
    prompts: dict[str, set[bytes]] = {name: set() for name in names}
    rows = dict.fromkeys(names, 0)
    try:
        _distribute(source, drafts, validation, test, seed, prompts, rows)
        empty = [name for name in names if not rows[name]]
        if empty:
            total = sum(map(len, prompts.values()))
            raise SamplingError(
                f"the {' and '.join(empty)} part got none of the {total} different prompts of {source}; "
                "sample more prompts, choose a larger share or another --seed."
            )
        for name in names:
            os.replace(drafts[name], files[name])
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    return {name: Part(files[name], len(prompts[name]), rows[name]) for name in names}


def _distribute(
    source: Path,
    drafts: dict[str, Path],
    validation: float,
    test: float,
    seed: int,
    prompts: dict[str, set[bytes]],
    rows: dict[str, int],
) -> None:
    open_files: dict[str, BinaryIO] = {}
    try:
        for name, draft in drafts.items():
            open_files[name] = draft.open("wb")
        for line, row, where in _rows(source):
            key = prompt_key(row, where)
            at = place(key, seed)
            name = "validation" if at < validation else "test" if at < validation + test else "train"
            if carry_images(row, source, drafts[name]):
                line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            open_files[name].write(line)
            prompts[name].add(hashlib.blake2b(key, digest_size=16).digest())
            rows[name] += 1
    finally:
        for file in open_files.values():
            file.close()


def _rows(source: Path) -> Iterator[tuple[bytes, Any, str]]:
    """(line with its line end, parsed row, its place for messages) of each line that is not empty."""
    with source.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{source}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise SamplingError(f"{where} is not JSON ({error}); repair or remove it.") from None
            yield (line if line.endswith(b"\n") else line + b"\n"), row, where
