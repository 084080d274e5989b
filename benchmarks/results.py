"""The one CSV schema of the benchmarks: a row for each thing measured and each provider."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch


class Result(NamedTuple):
    """One row. `name` ends with the unit; the quantiles are over the repeats."""

    name: str
    provider: str
    sizes: str
    p20: float
    p50: float
    p80: float


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    found = torch.tensor(list(values), dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return tuple(found.tolist())  # type: ignore[return-value]


def hardware() -> str:
    """The device that was measured."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"


def versions(*packages: str) -> str:
    """Versions of torch and of these packages."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", *packages))


def write(path: Path, rows: Iterable[Result], *packages: str) -> None:
    """Write the rows, with hardware and versions in each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*Result._fields, "hardware", "versions"))
        for row in rows:
            spread = (f"{value:.4g}" for value in row[3:])
            writer.writerow((*row[:3], *spread, hardware(), versions(*packages)))
