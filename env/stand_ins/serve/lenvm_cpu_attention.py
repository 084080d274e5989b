"""Decode attention of SGLang's `torch_native` backend in a few calls a layer, instead of one for each sequence.

Why it exists: on a CPU without AMX, `torch_native` is the one attention backend SGLang has, and its decode path is a
Python loop that gathers keys and values and calls attention for each sequence. With a small model and many sequences
that loop is three quarters of a server's time. This stand-in does the same sums over padded groups of sequences.

It is an SGLang plug-in (entry point in the .dist-info beside it), copied into CPU environments by `env/build.py`. It
does nothing under a CUDA torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

GROUP = 16
"""Sequences of a call. They are sorted by length, so that small groups leave little padding."""
TARGET = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend._run_sdpa_forward_decode"


def register() -> None:
    """Called by SGLang when it loads its plug-ins."""
    if torch.version.cuda is not None:
        return
    if "sglang.srt.managers.detokenizer_manager" in sys.modules and "sglang.srt.managers.scheduler" not in sys.modules:
        return  # a detokenizer has no attention, and resolving the target would import it
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, decode, HookType.AROUND)


def decode(
    loop: Callable[..., Tensor],
    backend: Any,
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    encoder_lens: Tensor | None = None,
    scaling: float | None = None,
    enable_gqa: bool = False,
    causal: bool = False,
    is_cross_attn: bool = False,
    sliding_window_size: int | None = None,
) -> Tensor:
    """One new token of each of B sequences against its cached keys and values.

    Args:
        loop: the host's own method, which takes everything that is not plain full attention.
        query, output: [B, Hq, D] and [B, Hq, Dv]; `output` is filled and returned.
        k_cache, v_cache: [slots, Hkv, D].
        req_to_token: [requests, context] slots; req_pool_indices: [B] its rows; seq_lens: [B], the new token included.
    """
    plain = encoder_lens is None and not is_cross_attn and not causal and sliding_window_size is None
    if not plain or k_cache.dtype != query.dtype or v_cache.dtype != query.dtype:
        return loop(
            backend, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens,
            scaling=scaling, enable_gqa=enable_gqa, causal=causal, is_cross_attn=is_cross_attn,
            sliding_window_size=sliding_window_size,
        )  # fmt: skip
    for rows in seq_lens.argsort().split(GROUP):
        lengths = seq_lens[rows]
        columns = torch.arange(int(lengths[-1]))
        inside = columns < lengths[:, None]  # [G, L]
        slots = req_to_token[req_pool_indices[rows], : len(columns)].long().masked_fill(~inside, 0)
        attended = scaled_dot_product_attention(
            query[rows].unsqueeze(2),  # [G, Hq, 1, D]
            gather(k_cache, slots),  # [G, Hkv, L, D]
            gather(v_cache, slots),
            attn_mask=inside[:, None, None, :],
            scale=scaling,
            enable_gqa=enable_gqa,
        )
        output[rows] = attended.squeeze(2)
    return output


def gather(cache: Tensor, slots: Tensor) -> Tensor:
    """Entries of [slots, H, D] at [G, L], as [G, H, L, D]. `embedding` copies whole rows, which plain indexing of three
    dimensions does not: 0.7 of its time."""
    return embedding(slots, cache.flatten(1)).unflatten(-1, cache.shape[1:]).transpose(1, 2)
