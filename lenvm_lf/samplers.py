"""Batch construction: completions of one prompt together, for the comparison of the paper's section 4.2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch


class PromptSampler(torch.utils.data.Sampler[int]):
    """Prompts in random order, the completions of each one after the other, so that a batch holds groups of them.

    The order is a function of seed and epoch alone: ranks agree, and a resumed run goes on in the same one.

    Args:
        prompts: [rows] anything that is equal for completions of the same prompt.
        seed: of the order.
    """

    def __init__(self, prompts: Sequence[int], seed: int) -> None:
        _, self._group = np.unique(np.asarray(prompts), return_inverse=True)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another order for each epoch; called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._group)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        place = rng.permutation(int(self._group.max()) + 1)[self._group]
        within = rng.random(len(self._group))
        return iter(np.lexsort((within, place)).tolist())
