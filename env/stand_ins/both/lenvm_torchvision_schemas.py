"""Lets a CUDA build of torchvision be imported under a CPU build of torch.

Why it exists: PyPI's torchvision for Linux is a CUDA build. Its C++ operators cannot load under a CPU torch, and
`import torchvision` then dies, because its Python code registers fake kernels for two operators that were never
defined. Both hosts import torchvision for image transforms, which need no operator. This module defines the two
schemas, with no kernel behind them (calling one still raises), right before torchvision is imported.

`env/build.py` copies it into the CPU environments with a .pth line that imports it at interpreter start. It does
nothing under a CUDA torch, nor with a torchvision whose own operators can load.
"""

import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

SCHEMAS = tuple(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for op in ("nms", "qnms"))

_libraries: list[Any] = []  # torch forgets the schemas when the library object dies


def is_cuda_build(package: ModuleSpec | None) -> bool:
    """Whether an installed torchvision or torchaudio was built for CUDA, by the `+cu130` in its version.py.

    The package itself cannot be asked: importing it is what fails.
    """
    if package is None or package.origin is None:
        return False
    version_file = Path(package.origin).with_name("version.py")
    if not version_file.is_file():
        return False
    text = version_file.read_text(encoding="utf-8")
    return re.search(r"""^__version__\s*(?::\s*str\s*)?=\s*['"][^'"]*\+cu\d""", text, re.MULTILINE) is not None


def define_schemas(torchvision: ModuleSpec | None) -> bool:
    """Define the schemas if, and only if, torch is a CPU build and torchvision is not. Returns whether it did."""
    import torch

    if torch.version.cuda is not None or not is_cuda_build(torchvision):
        return False
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return True


class BeforeTorchvision(MetaPathFinder):
    """Finds nothing itself: acts when torchvision is first looked for, then takes itself off `sys.meta_path`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            define_schemas(PathFinder.find_spec("torchvision"))
        return None


sys.meta_path.insert(0, BeforeTorchvision())
