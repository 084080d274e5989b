"""`neat_packing`: several completions in one sequence, none of which sees another.

Each completion keeps the positions of a row of its own. transformers builds its attention mask from positions that
start again where no mask is given, for every implementation of attention, so the values are those of unpacked rows.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lenvm_lf.collator import IGNORE
from lenvm_lf.shared_prefix import BACKBONES


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which rows go together: each, from the longest down, into the fullest sequence that still has room (best fit).

    Args:
        lengths: tokens of each row, none above `capacity`.
        capacity: tokens of a sequence.

    Returns:
        row numbers of each sequence.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, sequence), sorted
    for row in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        at = bisect.bisect_left(room, (lengths[row], -1))
        if at == len(room):
            packs.append([])
            left, number = capacity, len(packs) - 1
        else:
            left, number = room.pop(at)
        packs[number].append(row)
        bisect.insort(room, (left - lengths[row], number))
    return packs


class PackedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows of a processed data set, several to an item.

    Args:
        rows: as `LengthValueProcessor` makes it.
        capacity: tokens of a sequence.
    """

    def __init__(self, rows: Any, capacity: int) -> None:
        self.rows = rows
        self.packs = pack(list(rows["length"]), capacity)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"rows": [self.rows[i] for i in self.packs[index]]}


@dataclass
class PackedCollator:
    """`DenseReturnCollator`'s counterpart for `PackedRows`.

    Attributes:
        pad_token_id: fills `input_ids`.
        multiple_of: pad the sequence length to a multiple of this.
    """

    pad_token_id: int
    multiple_of: int = 1

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch of B sequences, T positions.

        Returns:
            input_ids, position_ids, labels [B, T] int64, censored [B, T] bool as unpacked; completion [B, T] int64, the
            number of the completion that a position belongs to; prompt [B] int64, 0. No attention mask: padding has
            position 0, so every padding token is a sequence of its own.
        """
        longest = max(sum(len(row["input_ids"]) for row in item["rows"]) for item in items)
        shape = (len(items), -(-longest // self.multiple_of) * self.multiple_of)
        input_ids, labels = np.full(shape, self.pad_token_id, np.int64), np.full(shape, IGNORE, np.int64)
        position_ids, completion = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        censored = np.zeros(shape, bool)
        for i, item in enumerate(items):
            start = 0
            for number, row in enumerate(item["rows"]):
                length, first = len(row["input_ids"]), row["prompt_length"] - 1
                end, states = start + length, np.arange(length - first)
                input_ids[i, start:end] = row["input_ids"]
                position_ids[i, start:end] = np.arange(length)
                labels[i, start + first : end] = row["completion_length"] - states
                censored[i, start + first : end] = row["censored"]
                completion[i, start:end] = number
                start = end
            completion[i, start:] = max(0, len(item["rows"]) - 1)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(position_ids),
            "labels": torch.from_numpy(labels),
            "censored": torch.from_numpy(censored),
            "completion": torch.from_numpy(completion),
            "prompt": torch.zeros(len(items), dtype=torch.int64),
        }


def check_packing(config: Any, batch_size: int) -> None:
    """Refuse a backbone or an attention that does not keep packed sequences apart.

    Args:
        config: of the loaded model.
        batch_size: sequences of a micro-batch.

    Raises:
        ValueError: one sentence: what it has, what to do.
    """
    text = config.get_text_config()
    if text.model_type not in BACKBONES:
        raise ValueError(
            f"`neat_packing` is tested with {', '.join(BACKBONES)} only, got {text.model_type!r}; "
            "set `neat_packing: false`."
        )
    attention = str(config._attn_implementation)
    if "flash" in attention and batch_size > 1:  # it finds the borders in a single sequence only
        raise ValueError(
            f"`neat_packing` under {attention!r} needs `per_device_train_batch_size: 1`, got {batch_size}; "
            "set it to 1 with a larger `cutoff_len`, or `flash_attn: sdpa`."
        )
