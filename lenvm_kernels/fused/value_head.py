"""`value_head`: z = w2 . SiLU(w1 h + b1) + b2 with the hidden layer in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lenvm.heads import ValueHead
from lenvm_kernels.fused.common import product_tile

BLOCK_M, BLOCK_N, BLOCK_H = 64, 32, 32
"""Rows, hidden units and input features of a tile. Fixed, so that the order of a row's sums, and with it z to the last
bit, does not depend on the batch. Few hidden units a program, because a small batch must still occupy the device."""
WARPS, STAGES = 4, 3


@triton.jit
def value_head_kernel(
    HIDDEN, W1, B1, W2, B2, PARTIAL, M, H, hidden_row, w1_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """PARTIAL[j, m] = sum over the j-th block of hidden units of w2 SiLU(w1 h_m + b1); b2 goes to block 0."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_units = rows < M, units < H
    offset = rows.to(tl.int64) * hidden_row
    inner = product_tile(HIDDEN, offset, in_rows, W1, w1_row, units, in_units, H, BLOCK_M, BLOCK_N, BLOCK_H, UPCAST)
    inner += tl.load(B1 + units, mask=in_units, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(W2 + units, mask=in_units, other=0.0).to(tl.float32)
    part = tl.sum(inner / (1.0 + tl.exp(-inner)) * w2[None, :], 1)
    part += tl.where(tl.program_id(1) == 0, tl.load(B2).to(tl.float32), 0.0)
    tl.store(PARTIAL + tl.program_id(1).to(tl.int64) * M + rows, part, mask=in_rows)


def value_head(hidden: Tensor, head: ValueHead, upcast: bool | None = None) -> Tensor:
    """Launch; arguments as in `lenvm_kernels.dispatch.value_head`.

    Args:
        hidden: [..., H].
        head: the head.
        upcast: multiply in float32. Default: where the dtypes ask for it, and in the interpreter, whose half precision
            products are wrong.
    """
    from lenvm_kernels.dispatch import INTERPRETED

    x = hidden.reshape(-1, hidden.shape[-1])
    x = x if x.stride(1) == 1 else x.contiguous()
    w1 = head.w1 if head.w1.stride(1) == 1 else head.w1.contiguous()
    count, features = x.shape
    blocks = triton.cdiv(features, BLOCK_N)
    partial = torch.empty(blocks, count, dtype=torch.float32, device=x.device)
    if upcast is None:
        upcast = INTERPRETED or w1.dtype == torch.float32
    value_head_kernel[(triton.cdiv(count, BLOCK_M), blocks)](
        x, w1, head.b1, head.w2, head.b2, partial, count, features, x.stride(0), w1.stride(0),
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_H=BLOCK_H, UPCAST=upcast, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return partial.sum(0).view(hidden.shape[:-1])
