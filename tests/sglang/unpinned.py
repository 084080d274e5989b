"""A plug-in of the tests' own: SGLang's LoRA layers without pinned memory, which a machine without accelerator has not.

With it SGLang 0.5.23 serves adapters on a CPU (`--lora-backend torch_native`); without it no server with LoRA starts
there, LenVM or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register() -> None:
    """SGLang calls `torch.tensor(..., pin_memory=True)` and the like, and `Tensor.pin_memory`, by these names."""
    if torch.accelerator.is_available():
        return
    for name in ("tensor", "empty", "zeros"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor  # type: ignore[method-assign, assignment, misc, return-value]


def unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`make` without its argument `pin_memory`."""

    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return make(*args, **kwargs)

    return made
