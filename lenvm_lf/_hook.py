"""Post-import hook: the only code of this package that runs at interpreter start. Standard library only.

It watches for five modules of LlamaFactory; right after the host has executed one, `lenvm_lf.seams.apply` gets it.
Interpreters that never import LlamaFactory pay one more entry in `sys.meta_path` and nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DISABLE = "LENVM_LF_DISABLE"
TARGETS = frozenset(
    {
        "llamafactory.extras.constants",
        "llamafactory.hparams.parser",
        "llamafactory.data.loader",
        "llamafactory.model.loader",
        "llamafactory.train.tuner",
    }
)


class _Loader:
    """Stands in for a target's loader until the module has been executed; everything else goes to the real one."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:  # get_code, get_source, is_package, ...
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # leave no trace on the module
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        from lenvm_lf import seams

        seams.apply(module)


class _Finder:
    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in TARGETS:
            return None
        for finder in sys.meta_path:
            if finder is cls or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


def install() -> None:
    """Hook LlamaFactory in this process; does nothing if it is hooked already or `LENVM_LF_DISABLE` is set."""
    if os.environ.get(DISABLE) or _Finder in sys.meta_path:
        return
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
    late = sorted(name for name in TARGETS if name in sys.modules)
    if late:  # names were already copied out of these modules by `from x import y`
        from lenvm_lf import seams

        seams.PROBLEMS.append(f"{', '.join(late)}: imported before lenvm_lf was installed; install lenvm_lf first")
