"""Starting the hosts for tests with less to wait for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

SERVED = ("llama", "qwen2", "qwen3")
"""Of SGLang's model modules, those of which the tests serve a model."""


def few_models(*more: str) -> dict[str, str]:
    """Environment of a server that imports those model modules alone (and `more`), by SGLang's own switch: a scheduler
    otherwise imports two hundred of them, which takes longer than all the rest of the start of a tiny model."""
    spec = find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations, "tests of servers need SGLang"
    modules = (Path(spec.submodule_search_locations[0]) / "srt" / "models").glob("*.py")
    others = sorted(path.stem for path in modules if path.stem not in (*SERVED, *more, "__init__", "registry"))
    return {"SGLANG_DISABLED_MODEL_ARCHS": ",".join(others)}
