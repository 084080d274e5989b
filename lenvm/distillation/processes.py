"""Several processes that read states together: what torchrun, and every launcher like it, starts.

Reading is what takes the time: the base and the teacher over every completion. So the processes share out the batches
of a round, and the first one fits the head to all of them, as if it had read them itself: to the digit where the
devices are alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""How long a process waits for another: the first one fits and checks while the others wait."""


@dataclass(frozen=True)
class Processes:
    """This process among all of them; alone by default.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        device: where it computes.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the one that fits, writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> dict[int, T]:
        """This process' items by their numbers; each item is one process'."""
        return {i: items[i] for i in range(self.rank, len(items), self.count)}

    def agree(self, value: int) -> int:
        """The first process' value, everywhere."""
        if self.count == 1:
            return value
        one = torch.tensor([value], dtype=torch.int64, device=self.device)
        torch.distributed.broadcast(one, src=0)
        return int(one)

    def spread(self, tensors: Sequence[Tensor] | None, number: int, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Item `number` from the process whose share it was in to all others.

        Args:
            tensors: the item where it is; None elsewhere.
            number: as in `share`.
            dtypes: of the tensors, each of at most three dimensions.
        """
        if self.count == 1:
            assert tensors is not None
            return list(tensors)
        owner = number % self.count
        out = []
        for i, dtype in enumerate(dtypes):
            shape = torch.full((3,), -1, dtype=torch.int64, device=self.device)
            if tensors is not None:
                shape[: tensors[i].dim()] = torch.tensor(tensors[i].shape)
            torch.distributed.broadcast(shape, src=owner)
            sizes = [n for n in shape.tolist() if n >= 0]
            one = torch.empty(sizes, dtype=dtype, device=self.device) if tensors is None else tensors[i].contiguous()
            torch.distributed.broadcast(one, src=owner)
            out.append(one)
        return out


def usual_device() -> str:
    """The GPU, where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def processes() -> Iterator[Processes]:
    """What the launcher's environment says: WORLD_SIZE, RANK and LOCAL_RANK. One GPU a process, where there are any."""
    cuda = torch.cuda.is_available()
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(device=usual_device())
        return
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield Processes(int(os.environ["RANK"]), count, device)
    finally:
        torch.distributed.destroy_process_group()
