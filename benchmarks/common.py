"""What the benchmarks share: the CSV schema, the machine's name, percentiles."""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType

import torch

FIELDS = ("name", "provider", "sizes", "p20", "p50", "p80", "hardware", "versions")
"""Of every CSV: what was measured, by whom, at which size, 20th, 50th and 80th percentile, where, with what."""


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    return float(low), float(middle), float(high)


def hardware() -> str:
    """The GPU, or the processor."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    cpu = Path("/proc/cpuinfo")
    models = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    name = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread"


def versions() -> str:
    """Of what a figure depends on."""
    found = []
    for package in ("lenvm", "sglang", "torch", "transformers", "triton", "trl"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


class Table:
    """A CSV of measurements, written row by row.

    Args:
        path: file to write; its folder is made.
        note: stands behind the hardware's name, such as "dry run: times mean nothing".
    """

    def __init__(self, path: Path, note: str = "") -> None:
        self.path = path
        self._hardware = hardware() + (f" ({note})" if note else "")
        self._versions = versions()

    def __enter__(self) -> Table:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(FIELDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, provider: str, sizes: str, values: Sequence[float]) -> float:
        """One row of samples (a count is one sample); returns their median."""
        three = quantiles(values)
        row = (name, provider, sizes, *(f"{v:.6g}" for v in three), self._hardware, self._versions)
        self._writer.writerow(row)
        self._file.flush()
        return three[1]
