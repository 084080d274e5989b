"""DenseReturnCollator: sampled completions into dense targets, one for every state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""No target here; the host and transformers count `labels != -100` over the whole optimizer step."""


@dataclass
class DenseReturnCollator:
    """Pads rows of `LengthValueProcessor` on the right and lays a target on every state.

    The target at the position of s_t is the remaining length n = L - t, t = 0..L-1, from which the loss derives the
    return G_t = -(1 - gamma^n) (Eq. 2) and the length distribution's two-hot target. It rides in `labels`, so that
    transformers counts the target tokens of the optimizer step by itself (the denominator of Eq. 9).

    Attributes:
        pad_token_id: fills `input_ids`; never attended to.
        multiple_of: pad the sequence length to a multiple of this (tensor cores like 8).
    """

    pad_token_id: int
    multiple_of: int = 1

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch of B rows, T positions.

        Returns:
            input_ids [B, T] int64; attention_mask [B, T] int64; labels [B, T] int64, the remaining length at a target
            position (for a censored row the least it can be) and -100 elsewhere; censored [B, T] bool; prompt [B]
            int64, equal for completions of the same prompt.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple_of) * self.multiple_of
        shape = (len(rows), width)
        input_ids = np.full(shape, self.pad_token_id, np.int64)
        attention_mask = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        censored = np.zeros(shape, bool)
        for i, row in enumerate(rows):
            ids = row["input_ids"]
            first, total = row["prompt_length"] - 1, row["completion_length"]
            input_ids[i, : len(ids)] = ids
            attention_mask[i, : len(ids)] = 1
            labels[i, first : len(ids)] = np.arange(total, total - (len(ids) - first), -1)
            censored[i, first : len(ids)] = row["censored"]
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": torch.from_numpy(labels),
            "censored": torch.from_numpy(censored),
            "prompt": torch.tensor([row["prompt_hash"] for row in rows], dtype=torch.int64),
        }


class ImageReturnCollator:
    """`DenseReturnCollator` for models that see: the host's own collator reads the images of the batch, puts a blank
    one into a batch without any (so that every rank runs the vision tower) and computes the positions.

    Args:
        template: the host's.
        processor: the host's multimodal processor.
        tokenizer: the host's.
        model: whose position scheme is used.
        multiple_of: as for `DenseReturnCollator`.
    """

    def __init__(self, template: Any, processor: Any, tokenizer: Any, model: Any, multiple_of: int = 1) -> None:
        from llamafactory.data import MultiModalDataCollatorForSeq2Seq

        self._dense = DenseReturnCollator(tokenizer.pad_token_id)
        self._host = MultiModalDataCollatorForSeq2Seq(
            template=template,
            processor=processor,
            model=model,
            tokenizer=tokenizer,
            pad_to_multiple_of=multiple_of,
            label_pad_token_id=IGNORE,
        )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch of B rows, T positions.

        Returns:
            as `DenseReturnCollator`, with what the backbone takes beside (position_ids, pixel_values, ...).
        """
        dense = self._dense(rows)
        features = [
            {
                "input_ids": list(row["input_ids"]),
                "attention_mask": [1] * len(row["input_ids"]),
                "labels": dense["labels"][i, : len(row["input_ids"])].tolist(),
                "images": json.loads(row["images"]) if row["images"] else [],
            }
            for i, row in enumerate(rows)
        ]
        batch = dict(self._host(features))
        batch.pop("rope_deltas", None)  # only decoding needs them
        wider = batch["input_ids"].shape[1] - dense["censored"].shape[1]
        batch["censored"] = torch.nn.functional.pad(dense["censored"], (0, wider))
        return batch | {"prompt": dense["prompt"]}
