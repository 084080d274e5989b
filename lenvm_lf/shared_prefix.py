"""Shared-prefix packing: the completions of one prompt in one sequence that holds the prompt once.

A batch's rows of the same prompt become one sequence

    prompt[:-1] | prompt[-1] completion_1[:-1] | prompt[-1] completion_2[:-1] | ...
    block 0       block 1                        block 2

in which a token sees block 0 and its own block, up to itself, and carries the position it has in its own row. Every
token therefore sees exactly what it sees unpacked, and no completion sees another. The last prompt token is repeated,
because it is the state s_0 of each completion, with a target of its own. Different prompts never share a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lenvm_lf.collator import IGNORE

BACKBONES = ("gemma", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
"""Model types whose packed values were tested to be the unpacked ones."""
_PADDING = -1


@dataclass
class SharedPrefixCollator:
    """`DenseReturnCollator`'s counterpart; takes the same rows.

    Attributes:
        pad_token_id: fills `input_ids`.
        multiple_of: pad the sequence length to a multiple of this.
    """

    pad_token_id: int
    multiple_of: int = 1

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch of B prompts, T positions.

        Returns:
            input_ids, position_ids, labels [B, T] int64, censored [B, T] bool as unpacked; completion [B, T] int64, the
            number of the completion that a position belongs to (0: the prompt); attention_mask [B, 1, T, T] bool, True
            where a query sees a key; prompt [B] int64.
        """
        groups: dict[bytes, list[dict[str, Any]]] = {}
        for row in rows:
            ids = np.asarray(row["input_ids"], np.int64)
            prompt = ids[: row["prompt_length"]]  # the ids themselves, not their hash: nothing may ever leak
            groups.setdefault(prompt.tobytes(), []).append(row | {"input_ids": ids})
        packed = [self._pack(group) for group in groups.values()]
        longest = max(len(sequence["input_ids"]) for sequence in packed)
        width = -(-longest // self.multiple_of) * self.multiple_of
        fill = {
            "input_ids": self.pad_token_id,
            "position_ids": 0,
            "labels": IGNORE,
            "censored": False,
            "completion": _PADDING,
        }
        batch = {
            name: torch.from_numpy(
                np.stack([np.pad(s[name], (0, width - len(s[name])), constant_values=value) for s in packed])
            )
            for name, value in fill.items()
        }
        block = batch["completion"]
        # padding sees the prompt and itself: a row that sees nothing would be NaN, and nobody sees padding
        sees = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        batch["attention_mask"] = (sees & causal)[:, None]
        batch["completion"] = block.clamp(min=0)
        batch["prompt"] = torch.tensor([group[0]["prompt_hash"] for group in groups.values()], dtype=torch.int64)
        return batch

    @staticmethod
    def _pack(group: Sequence[dict[str, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        first = int(group[0]["prompt_length"]) - 1
        parts: dict[str, list[np.ndarray[Any, Any]]] = {
            "input_ids": [group[0]["input_ids"][:first]],
            "position_ids": [np.arange(first)],
            "labels": [np.full(first, IGNORE)],
            "censored": [np.zeros(first, bool)],
            "completion": [np.zeros(first, np.int64)],
        }
        for number, row in enumerate(group, start=1):
            own = row["input_ids"][first:]
            states = np.arange(len(own))
            parts["input_ids"].append(own)
            parts["position_ids"].append(first + states)
            parts["labels"].append(row["completion_length"] - states)
            parts["censored"].append(np.full(len(own), row["censored"]))
            parts["completion"].append(np.full(len(own), number))
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def check_backbone(config: Any) -> None:
    """Refuse a backbone in which a block mask does not decide everything that a token sees.

    Args:
        config: of the loaded model.

    Raises:
        ValueError: one sentence: what it has, what to do.
    """
    text = config.get_text_config()
    remedy = "set `lenvm_shared_prefix: false`"
    if text.model_type not in BACKBONES:
        raise ValueError(
            f"`lenvm_shared_prefix` is tested with {', '.join(BACKBONES)} only, got {text.model_type!r}; {remedy}."
        )
    layers = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    if window is not None and (layers is None or any(kind != "full_attention" for kind in layers)):
        raise ValueError(f"`lenvm_shared_prefix` needs full attention, got a sliding window of {window}; {remedy}.")
    if config._attn_implementation != "sdpa":
        raise ValueError(
            f"`lenvm_shared_prefix` needs the attention `sdpa`, which takes a block mask, got "
            f"{config._attn_implementation!r}; set `flash_attn: sdpa`, or {remedy}."
        )
