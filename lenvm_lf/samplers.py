"""The order of the training rows, where it is not simply at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class ShuffledLengthGroups(LengthGroupedSampler):
    """Batches of similar length in random order.

    transformers' sampler goes through 50 batches from the longest to the shortest. Here length is what is learned: the
    model follows, and ends the training on the short ones (in the demo, predictions came out 36 % too short).
    """

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rest = batches.pop() if len(batches[-1]) < self.batch_size else []  # stays last: it would shift the others
        for i in torch.randperm(len(batches), generator=self.generator).tolist():
            yield from batches[i]
        yield from rest


class PromptSampler(torch.utils.data.Sampler[int]):
    """Prompts in random order, the completions of each one after the other, so that a batch holds groups of them
    (for the comparison of the paper's section 4.2, and for `lenvm_shared_prefix`).

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
