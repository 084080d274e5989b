"""Makes a CUDA build of torchaudio importable under a CPU build of torch, as the pure-Python package it then is.

Why it exists: PyPI's torchaudio for Linux is a CUDA build, LlamaFactory imports torchaudio on every start
(`data/mm_plugin.py`), and torchaudio dies at import when its extension modules are there but cannot load. Without
them it imports; reading audio and resampling are Python. `env/build.py` runs this file with the interpreter of the CPU
training environment: it removes the extension modules there. Under a CUDA torch it refuses.
"""

import importlib.util
import re
import sys
from pathlib import Path

import torch


def strip_extensions(torchaudio: Path) -> list[Path]:
    """Remove the extension modules of a CUDA build of torchaudio.

    torchaudio: the package's folder. Returns the files removed; none for a CPU build, whose extensions load.
    Raises RuntimeError if torch is a CUDA build.
    """
    if torch.version.cuda is not None:
        raise RuntimeError(
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}: "
            "torchaudio's extensions stay as they are"
        )
    version = (torchaudio / "version.py").read_text(encoding="utf-8")
    if not re.search(r"""^__version__.*\+cu\d""", version, re.MULTILINE):
        return []
    removed = sorted((torchaudio / "lib").glob("*.so"))
    for extension in removed:
        extension.unlink()
    return removed


def main() -> int:
    spec = importlib.util.find_spec("torchaudio")
    if spec is None or spec.origin is None:
        print("torchaudio is not installed here", file=sys.stderr)
        return 1
    for path in strip_extensions(Path(spec.origin).parent):
        print(f"removed {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
