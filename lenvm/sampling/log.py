"""The file of completions: appended line by line, repaired and continued after a crash, sorted at the end."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from lenvm.sampling.errors import SamplingError


class CompletionLog:
    """An append-only JSONL file of completions and its sidecar `FILE.meta.json` with the parameters.

    Use it as a context manager: it holds a lock, so that two runs cannot write one file. Each row is flushed; a line
    that a crash tore is cut off when the file is opened again.

    Attributes:
        path: the JSONL file.
        done: (prompt id, sample) of every row that is there.
        tokens: completion tokens of these rows together.
        repaired: bytes of a torn last line that were cut off.
    """

    def __init__(self, path: Path, parameters: dict[str, Any]) -> None:
        self.path = path
        self.parameters = parameters
        self.done: set[tuple[str, int]] = set()
        self.tokens = 0
        self.repaired = 0
        self._file: BinaryIO | None = None

    @property
    def sidecar(self) -> Path:
        """Where the parameters are kept."""
        return sidecar_of(self.path)

    def __enter__(self) -> CompletionLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("ab+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise SamplingError(
                f"another process is writing {self.path}; wait for it or choose another --out."
            ) from None
        try:
            self._check_parameters(empty=os.fstat(file.fileno()).st_size == 0)
            self._take_up(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, row: dict[str, Any]) -> None:
        """Append one completion and flush it."""
        if self._file is None:
            raise RuntimeError("the log is not open; use it in a `with` statement")
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.done.add((row["prompt_id"], row["sample"]))
        self.tokens += len(row["completion_token_ids"])

    def finish(self, prompt_ids: Sequence[str]) -> None:
        """Sort the rows by prompt and sample, so that the file does not depend on which answer came first.

        Rows stay on the disk; what is held of each is its place.
        """
        place = {prompt_id: i for i, prompt_id in enumerate(prompt_ids)}
        order: list[tuple[int, int, int, int]] = []  # prompt, sample, where the line begins, its length
        offset = 0
        with self.path.open("rb") as lines:
            for line in lines:
                row = json.loads(line)
                order.append((place[row["prompt_id"]], row["sample"], offset, len(line)))
                offset += len(line)
        if all(a <= b for a, b in itertools.pairwise(order)):
            return
        order.sort()
        temporary = self.path.with_name(self.path.name + ".sorted")
        with self.path.open("rb") as unsorted, temporary.open("wb") as done:
            for _, _, start, length in order:
                unsorted.seek(start)
                done.write(unsorted.read(length))
        os.replace(temporary, self.path)

    def _check_parameters(self, empty: bool) -> None:
        if not self.sidecar.exists():
            if not empty:
                raise SamplingError(
                    f"{self.path} exists without {self.sidecar.name}, so nobody knows how it was sampled; "
                    "remove it or choose another --out."
                )
            write_json(self.sidecar, {"parameters": self.parameters})
            return
        try:
            before = json.loads(self.sidecar.read_text(encoding="utf-8"))["parameters"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise SamplingError(f"{self.sidecar} is not readable; remove it together with {self.path.name}.") from None
        differing = [k for k in sorted({*before, *self.parameters}) if before.get(k) != self.parameters.get(k)]
        if differing and empty:  # nothing was drawn with the old ones
            write_json(self.sidecar, {"parameters": self.parameters})
        elif differing:
            changes = ", ".join(f"{k}: {before.get(k)!r} then, {self.parameters.get(k)!r} now" for k in differing)
            raise SamplingError(
                f"{self.path} was begun with other parameters ({changes}); "
                "give the same ones to continue it, remove it, or choose another --out."
            )

    def _take_up(self, file: BinaryIO) -> None:
        """Collect what is there and cut off a torn last line."""
        file.seek(0)
        good = 0
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                key = (row["prompt_id"], row["sample"])
                tokens = len(row["completion_token_ids"])
            except (ValueError, KeyError, TypeError):
                if file.read(1):
                    raise SamplingError(
                        f"{self.path}, line {number} is not a completion though others follow; repair or remove it."
                    ) from None
                break
            if not line.endswith(b"\n"):
                break
            if key in self.done:
                raise SamplingError(
                    f"{self.path}, line {number} repeats sample {key[1]} of prompt {key[0]!r}; remove it."
                )
            self.done.add(key)
            self.tokens += tokens
            good += len(line)
        self.repaired = file.seek(0, os.SEEK_END) - good
        file.truncate(good)
        file.seek(0, os.SEEK_END)


def sidecar_of(path: Path) -> Path:
    """The file with the parameters of a file of completions."""
    return path.with_name(path.name + ".meta.json")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a finished file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
