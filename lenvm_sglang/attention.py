"""Attention of candidate rows: K queries that share a prefix and see, beyond it, only themselves.

To the host's own backends they are K decode rows, each of which reads the whole prefix. Here a row's prefix is read
once: on a GPU by our kernel (`FusedPrefixBackend`), in plain torch where the host has no fused attention either
(`SharedPrefixBackend`: `torch_native`, the CPU).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lenvm_kernels import PrefixMasks, PrefixRows, SharedRows, attend_prefix, share_prefix


def attend(query: Tensor, layout: PrefixRows, k_cache: Tensor, v_cache: Tensor, scaling: float) -> Tensor:
    """Attention of R x K candidates, whose own keys and values are in the cache already.

    Args:
        query: [R * K, Hq, D].
        layout: where they stand.
        k_cache, v_cache: [slots, Hkv, D].
        scaling: of the logits.

    Returns:
        [R * K, Hq, Dv].
    """
    rows, _, width, length = layout.mask.shape

    def gathered(cache: Tensor) -> Tensor:  # [R, Hkv, K + L, D]
        found = cache.index_select(0, layout.slots).to(query.dtype)
        return found.view(rows, length, *cache.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        query.view(rows, width, *query.shape[1:]).transpose(1, 2),
        gathered(k_cache),
        gathered(v_cache),
        attn_mask=layout.mask,
        scale=scaling,
        enable_gqa=query.shape[1] != k_cache.shape[1],
    )
    return out.transpose(1, 2).reshape(rows * width, query.shape[1], -1)


class AttentionError(RuntimeError):
    """A model whose attention is another than the backends here compute. It is tried before anything is served
    (`ValueWorker.warm_up`), and the host's attention then takes its place."""


class CandidateBackend(ABC):
    """An attention backend for candidate forwards, in the shape that SGLang's RadixAttention calls.

    Attributes:
        token_to_kv_pool, req_to_token_pool: the value model's pools, where the host's layers look for them.
    """

    def __init__(self, kv_pool: Any, request_pool: Any) -> None:
        self.token_to_kv_pool = kv_pool
        self.req_to_token_pool = request_pool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True,
                **given: Any) -> Tensor:  # fmt: skip
        """Called by the host's attention layer; q, k, v are flat, [N, heads * D]. `save_kv_cache` is False where the
        host's fused kernels have written them already.

        Raises:
            AttentionError: a model whose attention has more to it, such as sinks.
        """
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        unknown = sorted(name for name, value in given.items() if value is not None)
        if unknown:
            raise AttentionError(
                f"candidates are scored with plain attention, and the value model asks for {', '.join(unknown)} too; "
                "serve one on a backbone with plain attention"
            )
        pool = self.token_to_kv_pool
        if save_kv_cache:
            key = k.reshape(-1, layer.tp_k_head_num, layer.qk_head_dim)
            value = v.reshape(-1, layer.tp_v_head_num, layer.v_head_dim)
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), key, value)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        caches = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        return self.attend(query, *caches, layer.scaling).flatten(1)

    @abstractmethod
    def attend(self, query: Tensor, k_cache: Tensor, v_cache: Tensor, scaling: float) -> Tensor:
        """[N, Hq, D] queries of candidates whose keys and values are in the caches -> [N, Hq, Dv]."""


class FusedPrefixBackend(CandidateBackend):
    """`lenvm_kernels.attend_prefix`.

    Attributes:
        rows: where the candidates of the next forward stand.
    """

    rows: SharedRows

    def attend(self, query: Tensor, k_cache: Tensor, v_cache: Tensor, scaling: float) -> Tensor:
        """As in the base class."""
        return attend_prefix(query, self.rows, k_cache, v_cache, scaling)


class SharedPrefixBackend(CandidateBackend):
    """One call of torch's attention for all candidates, under a mask, on gathered keys and values."""

    def __init__(self, kv_pool: Any, request_pool: Any, dtype: torch.dtype) -> None:
        super().__init__(kv_pool, request_pool)
        device = request_pool.req_to_token.device
        # watched rows have one candidate, steered ones many: a batch of both has two forwards a step
        self.masks = {alone: PrefixMasks(dtype, device) for alone in (True, False)}
        self.layout: PrefixRows | None = None
        self.fed: Tensor | None = None

    def prepare(
        self, pool_rows: Tensor, prefix_lengths: Tensor, longest: int, own: Tensor, fed: Tensor | None = None
    ) -> PrefixRows:
        """Set the rows of the next forward.

        Args:
            pool_rows: [R] rows of the host's request pool.
            prefix_lengths: [R] tokens before the candidates, <= longest.
            own: [R, K] slots of the candidates, 0 (the host's dump) where there is none.
            fed: [N] which of the R x K candidates it is given (default all).

        Returns:
            Where all R x K stand; until the next call.
        """
        table = self.req_to_token_pool.req_to_token
        masks = self.masks[own.shape[1] == 1]
        self.layout = share_prefix(prefix_lengths, pool_rows, own, table, longest, masks)
        self.fed = fed
        return self.layout

    def attend(self, query: Tensor, k_cache: Tensor, v_cache: Tensor, scaling: float) -> Tensor:
        """As in the base class; [R * K, Hq, D], or those that are fed."""
        assert self.layout is not None, "prepare() comes first"
        if self.fed is None:
            return attend(query, self.layout, k_cache, v_cache, scaling)
        # what stands in for the others sees its row's prefix and is thrown away
        rows, width = self.layout.mask.shape[0], self.layout.mask.shape[2]
        query = query.new_zeros(rows * width, *query.shape[1:]).index_copy_(0, self.fed, query)
        return attend(query, self.layout, k_cache, v_cache, scaling).index_select(0, self.fed)
