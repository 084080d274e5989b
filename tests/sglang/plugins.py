"""SGLang plug-ins of the tests, loaded by a server beside ours."""

from __future__ import annotations

from pathlib import Path


def install(directory: Path, *modules: str) -> Path:
    """Write the metadata of distributions whose entry points are `register` of these modules of `tests.sglang`; the
    folder belongs on PYTHONPATH."""
    for name in modules:
        info = directory / f"lenvm_{name}-0.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lenvm-{name}\nVersion: 0.0\n")
        (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\nlenvm_{name} = tests.sglang.{name}:register\n")
    return directory
