"""One job on many machines: each draws a shard of the prompts, and the parts are put together without loss."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lenvm.sampling.errors import SamplingError
from lenvm.sampling.images import carry_images, link_images
from lenvm.sampling.log import sidecar_of, write_json

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `of`: a run of neighbouring prompts, so that joined parts are the whole in its order."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "2/4".

        Raises:
            SamplingError: for anything else.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise SamplingError(f"--shard takes i/n with 1 <= i <= n, for instance 2/4, got {text!r}.")
        return cls(int(match[1]), int(match[2]))

    def of_list(self, items: Sequence[T]) -> Sequence[T]:
        """This shard's items; shards differ by one item at most."""
        return items[(self.index - 1) * len(items) // self.of : self.index * len(items) // self.of]


@dataclass(frozen=True)
class Merged:
    """What was put together, and what is not there yet."""

    rows: int
    missing: int


def merge(parts: Sequence[Path], out: Path, allow_missing: bool = False) -> Merged:
    """Put the files of all shards together, with a sidecar, so that `lenvm sample` could go on with the result.

    Args:
        parts: the files of all shards of one run, in any order.
        out: the file to write; it must not be there.
        allow_missing: also where shards are not finished; the same command without --shard draws the rest.

    Raises:
        SamplingError: if parts are missing, doubled, unfinished, of different runs or damaged. Nothing is written then.
    """
    if out.exists():
        raise SamplingError(f"{out} is there already; choose another --out or remove it.")
    found: dict[int, tuple[Path, int]] = {}
    common: dict[str, Any] | None = None
    of = 0
    for part in parts:
        parameters = _parameters(part)
        shard = parameters.pop("shard", None)
        if shard is None:
            raise SamplingError(f"{part} was not drawn with --shard.")
        if common is None:
            common, of = parameters, shard["of"]
        differing = [k for k in sorted({*common, *parameters}) if common.get(k) != parameters.get(k)]
        if differing or shard["of"] != of:
            what = differing[0] if differing else "the number of shards"
            raise SamplingError(f"{part} and {parts[0]} belong to different runs: {what} differs.")
        if shard["index"] in found:
            raise SamplingError(f"{part} and {found[shard['index']][0]} are the same shard, {shard['index']}/{of}.")
        found[shard["index"]] = part, int(shard["prompts"])
    absent = [str(i) for i in range(1, of + 1) if i not in found]
    if absent or common is None:
        raise SamplingError(f"of {of} shards number {', '.join(absent) or '?'} is not here; give the files of all.")
    return _join([found[i] for i in range(1, of + 1)], int(common["n"]), common, out, allow_missing)


def _join(parts: Sequence[tuple[Path, int]], n: int, common: dict[str, Any], out: Path, allow_missing: bool) -> Merged:
    draft = out.with_name(out.name + ".part")
    owner: dict[str, int] = {}
    total = missing = 0
    gathered: dict[Path, Path] = {}
    try:
        with draft.open("wb") as joined:
            for k, (part, prompts) in enumerate(parts):
                seen: set[tuple[str, int]] = set()
                with part.open("rb") as lines:
                    for number, line in enumerate(lines, start=1):
                        row = _row(line, f"{part}, line {number}")
                        key = str(row["prompt_id"]), int(row["sample"])
                        if key in seen or owner.setdefault(key[0], k) != k:
                            raise SamplingError(f"{part}, line {number} repeats sample {key[1]} of prompt {key[0]!r}.")
                        seen.add(key)
                        if carry_images(row, part, out, gathered):
                            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                        joined.write(line)
                lacking = prompts * n - len(seen)
                if lacking and not allow_missing:
                    raise SamplingError(
                        f"{part} lacks {lacking} of {prompts * n} completions; finish it with its own command, "
                        "or merge what is there with --allow-missing."
                    )
                total, missing = total + len(seen), missing + lacking
        link_images(gathered)
        write_json(sidecar_of(out), {"parameters": common})
        os.replace(draft, out)
    finally:
        draft.unlink(missing_ok=True)
    return Merged(total, missing)


def _parameters(part: Path) -> dict[str, Any]:
    if not part.is_file():
        raise SamplingError(f"there is no file {part}.")
    try:
        return dict(json.loads(sidecar_of(part).read_text(encoding="utf-8"))["parameters"])
    except (OSError, ValueError, KeyError, TypeError):
        raise SamplingError(f"{sidecar_of(part)} is missing or not readable; it belongs to {part.name}.") from None


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        if not line.endswith(b"\n"):
            raise ValueError("torn")
        row = json.loads(line)
        str(row["prompt_id"]), int(row["sample"])
        return dict(row)
    except (ValueError, KeyError, TypeError):
        raise SamplingError(f"{where} is no completion; run the command of that shard again, it repairs it.") from None
