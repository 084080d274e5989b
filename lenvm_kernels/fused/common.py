"""Pieces shared by the kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lenvm import sampler

NEG_INF = tl.constexpr(float("-inf"))
NO_TOKEN = tl.constexpr(2**31 - 1)
"""Stands for "no token id" in reductions; above every vocabulary."""

_WORD = (1 << 64) - 1
_INCREMENT = tl.constexpr(sampler._INCREMENT & _WORD)
_MIX_A = tl.constexpr(sampler._MIX_A & _WORD)
_MIX_B = tl.constexpr(sampler._MIX_B & _WORD)


@triton.jit
def splitmix(x):
    """SplitMix64's finaliser on uint64, as in `lenvm.sampler`."""
    x = x + _INCREMENT
    x = (x ^ (x >> 30)) * _MIX_A
    x = (x ^ (x >> 27)) * _MIX_B
    return x ^ (x >> 31)


@triton.jit
def keyed_gumbel(seed, position, token):
    """Standard Gumbel noise, float64, the same as `lenvm.sampler.keyed_gumbel`; int64 arguments that broadcast."""
    key = splitmix(splitmix(splitmix(seed.to(tl.uint64)) ^ position.to(tl.uint64)) ^ token.to(tl.uint64))
    uniform = ((key >> 11).to(tl.int64).to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2^-53
    return -tl.log(-tl.log(uniform))


@triton.jit
def product_tile(
    X, x_offset, in_rows, W, w_row, units, in_units, H,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] float32: x . w of rows of H features that begin at X + x_offset and W + units * w_row.

    UPCAST multiplies in float32, as exactly as tensor cores can (three TF32 products)."""
    features = tl.arange(0, BLOCK_H)
    found = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, H, BLOCK_H):
        f = start + features
        in_features = f < H
        x = tl.load(X + x_offset[:, None] + f[None, :], mask=in_rows[:, None] & in_features[None, :], other=0.0)
        w = tl.load(
            W + units[None, :].to(tl.int64) * w_row + f[:, None],
            mask=in_units[None, :] & in_features[:, None],
            other=0.0,
        )
        if UPCAST:
            found = tl.dot(x.to(tl.float32), w.to(tl.float32), found, input_precision="tf32x3")
        else:
            found = tl.dot(x, w, found)
    return found


@triton.jit
def log_sum_exp(x):
    """log sum exp of a vector in its own dtype; -inf where it is all -inf."""
    top = tl.max(x, 0)
    finite = tl.where(top == NEG_INF, 0.0, top)
    total = tl.sum(tl.exp(x - finite), 0)
    return tl.where(total > 0, finite + tl.log(tl.where(total > 0, total, 1.0)), NEG_INF)


def as_bytes(flags: torch.Tensor) -> torch.Tensor:
    """A bool tensor as uint8 (the same memory): what the kernels load."""
    return flags.view(torch.uint8) if flags.dtype == torch.bool else flags


def rowwise(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with adjacent elements in its last dimension, copied only if they are not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
