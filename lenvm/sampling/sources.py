"""Rows of prompts from JSONL, parquet and Hugging Face dataset directories, one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lenvm.sampling.errors import SamplingError

BATCH = 64
"""Rows of a parquet or Arrow file that are in memory at once; they may hold images."""

Rows = Iterator[tuple[str, Any]]
"""(place for messages, row)."""


SPLITS = "train|training|test|validation|valid|val|dev"
"""Names that tell the parts of a data set apart; others where one is asked for."""


def read_source(path: Path, split: str | None = None) -> Rows:
    """Rows of a file, or of all files of a dataset directory in the order of their names.

    A directory is a dataset as `datasets` writes it with `save_to_disk` (Arrow files), or a copy of a dataset
    repository (parquet or JSONL files, in any folder below).

    Args:
        path: `.jsonl` (or any other text file), `.parquet`, or a directory.
        split: of a directory, where file or folder names tell several apart: they are never mixed.

    Raises:
        SamplingError: for what is not there, a directory without data or of several splits, or a file that cannot be
            read.
    """
    if path.is_dir():
        for file in _data_files(path, split):
            yield from _file(file)
        return
    if not path.is_file():
        raise SamplingError(f"there is no prompt file {path}; give a JSONL or parquet file, or a dataset directory.")
    yield from _file(path)


def split_names(path: Path, asked: str | None = None) -> list[str]:
    """The splits that the names in a dataset directory tell apart; of a file none.

    Args:
        path: file or directory.
        asked: a name to look for beside the usual ones.

    Raises:
        SamplingError: for a directory without data.
    """
    return sorted({name for name in _splits(path, asked).values() if name}) if path.is_dir() else []


def _splits(path: Path, asked: str | None) -> dict[Path, str | None]:
    """The files of a dataset directory, in order, and which split each is of."""
    for suffix in (".arrow", ".parquet", ".jsonl"):
        files = sorted(p for p in path.rglob(f"*{suffix}") if not p.name.startswith("."))
        if suffix == ".arrow":  # the cache of `datasets.map` lies beside the data
            files = [p for p in files if not p.name.startswith(("cache-", "tmp"))]
        if files:
            break
    else:
        raise SamplingError(f"{path} holds no .arrow, .parquet or .jsonl file; give the directory of a dataset.")
    # the asked name first: a set may keep its parts `python` and `cpp` in a folder `train`
    patterns = [re.compile(rf"(?:^|[/_.-])({n})(?=[/_.-])") for n in (*([re.escape(asked)] if asked else []), SPLITS)]
    places = {p: p.relative_to(path).as_posix() for p in files}
    return {p: next((m[1] for pattern in patterns if (m := pattern.search(at))), None) for p, at in places.items()}


def _data_files(path: Path, split: str | None) -> list[Path]:
    named = _splits(path, split)
    splits = sorted({name for name in named.values() if name})
    if split is None and len(splits) > 1:
        raise SamplingError(f"{path} holds the splits {', '.join(splits)}; name one with --split.")
    if split is None:
        return list(named)
    if split not in splits:
        raise SamplingError(f"{path} has no split {split!r}, it has {', '.join(splits) or 'none that a name tells'}.")
    return [p for p, name in named.items() if name == split]


def _file(path: Path) -> Rows:
    if path.suffix == ".parquet":
        yield from _numbered(path, _parquet(path))
    elif path.suffix == ".arrow":
        yield from _numbered(path, _arrow(path))
    else:
        yield from _jsonl(path)


def _jsonl(path: Path) -> Rows:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise SamplingError(f"{where} is not JSON ({error.msg}); repair or remove it.") from None
            yield where, row


def _numbered(path: Path, batches: Iterator[Any]) -> Rows:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", row


def _parquet(path: Path) -> Iterator[Any]:
    pyarrow = _pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=BATCH)
    except pyarrow.ArrowInvalid as error:
        raise SamplingError(f"{path} is no parquet file ({str(error).splitlines()[0]}).") from None


def _arrow(path: Path) -> Iterator[Any]:
    pyarrow = _pyarrow()
    try:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            for batch in stream:
                for start in range(0, batch.num_rows, BATCH):
                    yield batch.slice(start, BATCH)
    except pyarrow.ArrowInvalid as error:
        raise SamplingError(f"{path} is no Arrow file of `datasets` ({str(error).splitlines()[0]}).") from None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise SamplingError("parquet and Arrow files need pyarrow; install lenvm[eval].") from None
    return pyarrow
