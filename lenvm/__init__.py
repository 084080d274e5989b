"""Length value models: knowing and controlling how long a language model's answer gets, token by token.

The core. It imports torch and transformers and knows no host; `lenvm_lf` (LlamaFactory) and `lenvm_sglang` (SGLang)
build on it. Names are resolved on first use, so that `import lenvm` stays cheap for the command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "LengthBins": "lenvm.bins",
    "LenvmConfig": "lenvm.format",
    "LenvmFormatError": "lenvm.format",
    "LengthValueModel": "lenvm.modeling",
    "LengthValueOutput": "lenvm.modeling",
    "LengthRequest": "lenvm.request",
    "LengthFieldError": "lenvm.request",
}
__all__ = [
    "LengthBins",
    "LengthFieldError",
    "LengthRequest",
    "LengthValueModel",
    "LengthValueOutput",
    "LenvmConfig",
    "LenvmFormatError",
    "__version__",
]

if TYPE_CHECKING:
    from lenvm.bins import LengthBins
    from lenvm.format import LenvmConfig, LenvmFormatError
    from lenvm.modeling import LengthValueModel, LengthValueOutput
    from lenvm.request import LengthFieldError, LengthRequest


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lenvm' has no attribute {name!r}")
