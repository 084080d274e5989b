"""Done-markers: which stage was finished with which inputs, and how long it took."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lenvm.sampling.log import write_json


class Marker(BaseModel):
    """State of a stage.

    Attributes:
        key: hash of everything that decides its output (`stage_key`).
        state: "running" also stands for interrupted or failed.
        seconds: wall clock over all attempts.
        peak_bytes: largest resident memory of the process tree, over all attempts.
        attempts: how often it was begun.
    """

    model_config = ConfigDict(extra="ignore")
    key: str
    state: Literal["running", "done"]
    seconds: float = 0.0
    peak_bytes: int = 0
    attempts: int = 0


def read_marker(path: Path) -> Marker | None:
    """The marker; None if there is none or it cannot be read (then the stage is run)."""
    try:
        return Marker.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def write_marker(path: Path, marker: Marker) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, marker.model_dump())


def stage_key(settings: Mapping[str, Any], files: Iterable[Path], upstream: Iterable[str]) -> str:
    """Hash of a stage's settings, the content of the files it reads, and the keys of the stages before it."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    for key in upstream:
        digest.update(key.encode())
    return digest.hexdigest()
