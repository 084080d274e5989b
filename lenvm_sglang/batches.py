"""The host's forward batches: a part of one, and one of our own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lenvm_sglang.rows import Seen
from lenvm_sglang.state import to_device


def select_rows(batch: Any, rows: Sequence[int], index: Tensor) -> Any:
    """The part of a prefill batch that holds `rows`, without anything that concerns logits or sampling."""
    part = copy.copy(batch)
    part.sampling_info = part.mm_inputs = part.spec_info = part.lora_ids = part.input_embeds = None
    part.return_logprob = False
    part.next_token_logits_buffer = None
    seen: Seen | None = batch.lenvm_seen
    if seen is not None:
        # the forward overwrites both, and may be done again
        part.input_ids = seen.input_ids.clone()
        part.mm_inputs = [seen.images[row] for row in rows]
    if len(rows) == batch.batch_size:
        return part
    lengths = batch.extend_seq_lens_cpu
    starts = [0, *accumulate(lengths)]
    tokens = to_device([t for r in rows for t in range(starts[r], starts[r] + lengths[r])], torch.int64, index.device)
    part.batch_size = len(rows)
    for name in ("input_ids", "positions", "out_cache_loc"):
        setattr(part, name, getattr(part, name)[tokens])
    if batch.mrope_positions is not None:
        part.mrope_positions = batch.mrope_positions[:, tokens]
    for name in ("req_pool_indices", "seq_lens", "extend_seq_lens", "extend_prefix_lens", "orig_seq_lens"):
        value = getattr(batch, name)
        setattr(part, name, None if value is None else value[index])
    for name in ("extend_seq_lens_cpu", "extend_prefix_lens_cpu", "rids"):
        value = getattr(batch, name)
        setattr(part, name, None if value is None else [value[r] for r in rows])
    if batch.seq_lens_cpu is not None:
        part.seq_lens_cpu = batch.seq_lens_cpu[list(rows)]
        part.seq_lens_sum = int(part.seq_lens_cpu.sum())
    part.extend_num_tokens = sum(part.extend_seq_lens_cpu)
    part.extend_start_loc = torch.cumsum(part.extend_seq_lens, 0) - part.extend_seq_lens
    return part


class DecodeBatch:
    """A decode batch of rows of ours, [N] each. The host's object is kept and filled anew for each forward, because to
    make one sets some hundred fields."""

    def __init__(self) -> None:
        self._batch: Any = None

    def fill(self, input_ids: Tensor, positions: Tensor, lengths: Tensor, slots: Tensor, rotary: Tensor | None) -> Any:
        """The host's object, until the next call.

        Args:
            input_ids: [N] int64 tokens.
            positions: [N] int64 places in their sequences.
            lengths: [N] int64 tokens of the sequences with them.
            slots: [N] int64 slots that their KV goes to.
            rotary: [N] int64 rotary positions, for a model that reads images.
        """
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        if self._batch is None:
            self._batch = ForwardBatch(
                forward_mode=ForwardMode.DECODE,
                batch_size=0,
                input_ids=input_ids,
                req_pool_indices=slots,
                seq_lens=lengths,
                out_cache_loc=slots,
                seq_lens_sum=None,  # type: ignore[arg-type]
            )
        batch = self._batch
        batch.batch_size = len(input_ids)
        batch.input_ids, batch.positions, batch.seq_lens, batch.out_cache_loc = input_ids, positions, lengths, slots
        batch.req_pool_indices = slots  # overwritten where a backend reads it, as what follows
        batch.seq_lens_cpu = batch.seq_lens_sum = None
        batch.mrope_positions = None if rotary is None else rotary.expand(3, -1)
        return batch
