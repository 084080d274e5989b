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


def decode_batch(input_ids: Tensor, positions: Tensor, lengths: Tensor, slots: Tensor, rotary: Tensor | None) -> Any:
    """A decode batch of candidate rows, [N] each: tokens, places, sequence lengths with them, the slots their KV goes
    to, and, for a model that reads images, their rotary positions."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=input_ids.shape[0],
        input_ids=input_ids,
        req_pool_indices=slots,  # overwritten where a backend reads it
        seq_lens=lengths,
        out_cache_loc=slots,
        seq_lens_sum=None,  # type: ignore[arg-type]
        positions=positions,
        mrope_positions=None if rotary is None else rotary.expand(3, -1),
    )
