"""Attention of candidate rows in plain torch: K queries that share a prefix and see, beyond it, only themselves.

For hosts without a fused decode kernel (`torch_native`, the CPU): the host's own backend would run one attention call
and gather one copy of the prefix for each of the R x K rows; this one does it once for each layer. On a GPU the host's
backend is used as it is, because K rows with a common prefix are ordinary decode rows to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class CandidateLayout(NamedTuple):
    """Where the R x K candidate rows of one forward stand.

    Attributes:
        prefix_slots: [R, L] int64 KV slots of each row's prefix, padded.
        mask: [R, 1, K, L + K] bool, what each candidate sees: its prefix, then itself.
    """

    prefix_slots: Tensor
    mask: Tensor

    @classmethod
    def build(
        cls, table: Tensor, pool_rows: Tensor, prefix_lengths: Tensor, longest: int, width: int
    ) -> CandidateLayout:
        """Args: table [*, context] slots of each request; pool_rows [R]; prefix_lengths [R] <= longest; width K."""
        columns = torch.arange(longest, device=table.device)
        inside = columns[None, :] < prefix_lengths[:, None]  # [R, L]
        slots = table[pool_rows, :longest].long().masked_fill(~inside, 0)
        itself = torch.eye(width, dtype=torch.bool, device=table.device).expand(len(pool_rows), width, width)
        prefix = inside[:, None, :].expand(-1, width, -1)
        return cls(slots, torch.cat([prefix, itself], dim=-1)[:, None])


def attend(query: Tensor, key: Tensor, value: Tensor, layout: CandidateLayout, k_cache: Tensor, v_cache: Tensor,
           scaling: float) -> Tensor:  # fmt: skip
    """Attention of R x K candidates.

    Args:
        query: [R * K, Hq, D]; key, value: [R * K, Hkv, D], the candidates' own.
        layout: where they stand.
        k_cache, v_cache: [slots, Hkv, D].
        scaling: of the logits.

    Returns:
        [R * K, Hq, Dv].
    """
    rows, width = layout.prefix_slots.shape[0], layout.mask.shape[2]

    def split(x: Tensor) -> Tensor:  # [R * K, H, D] -> [R, K, H, D]
        return x.view(rows, width, *x.shape[1:])

    keys = torch.cat([k_cache[layout.prefix_slots].to(key.dtype), split(key)], dim=1)  # [R, L + K, Hkv, D]
    values = torch.cat([v_cache[layout.prefix_slots].to(value.dtype), split(value)], dim=1)
    out = F.scaled_dot_product_attention(
        split(query).transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=layout.mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).reshape(rows * width, query.shape[1], -1)


class SharedPrefixBackend:
    """An attention backend for candidate forwards, in the shape that SGLang's RadixAttention calls.

    Attributes:
        token_to_kv_pool, req_to_token_pool: the value model's pools, where the host's layers look for them.
    """

    def __init__(self, kv_pool: Any, request_pool: Any) -> None:
        self.token_to_kv_pool = kv_pool
        self.req_to_token_pool = request_pool
        self.layout: CandidateLayout | None = None
        self.fed: Tensor | None = None

    def prepare(
        self, pool_rows: Tensor, prefix_lengths: Tensor, longest: int, width: int, fed: Tensor | None = None
    ) -> None:
        """Set the rows of the next forward; `fed` [N] says which of the R x K candidates it is given (default all)."""
        table = self.req_to_token_pool.req_to_token
        self.layout = CandidateLayout.build(table, pool_rows, prefix_lengths, longest, width)
        self.fed = fed

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True,
                **_: Any) -> Tensor:  # fmt: skip
        """Called by the host's attention layer; q, k, v are flat, [R * K, heads * D] or [N, heads * D]."""
        assert self.layout is not None, "prepare() comes first"
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        key = k.reshape(-1, layer.tp_k_head_num, layer.qk_head_dim)
        value = v.reshape(-1, layer.tp_v_head_num, layer.v_head_dim)
        out = attend(
            self._all(query),
            self._all(key),
            self._all(value),
            self.layout,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            layer.scaling,
        )
        if save_kv_cache:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), key, value)
        if self.fed is not None:
            out = out[self.fed]
        return out.reshape(out.shape[0], -1)

    def _all(self, x: Tensor) -> Tensor:
        """[N, H, D] -> [R * K, H, D]; what stands in for the others is seen by nobody else."""
        if self.fed is None or self.layout is None:
            return x
        rows, _, width, _ = self.layout.mask.shape
        return x.new_zeros(rows * width, *x.shape[1:]).index_copy_(0, self.fed, x)
