"""What a step does around the candidates' forward on a CPU: where they stand, and the KV of those chosen last."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from lenvm_kernels.buffers import Keep, PrefixMasks, PrefixRows
from lenvm_kernels.compiled.common import compiled

_BITS = {
    dtype: (as_wide, int(torch.tensor(-torch.inf, dtype=dtype).view(as_wide)))
    for dtype, as_wide in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16))
}
"""Integers as wide as a mask's floats, because numpy knows no bfloat16, and minus infinity in their bits."""


@intrinsic
def at_address(typing_context, address):
    """An int64 as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@compiled("void(i8[:,:], i8[:], i8[:], i8[:], i8)")
def keep_kernel(addresses, chosen, pool_rows, target, slots):
    """Bytes of slot chosen[pool_rows[r]] to slot target[r], in buffers [N] of `slots` slots that begin at
    addresses[n, 0] and have addresses[n, 1] bytes a slot."""
    for n in range(len(addresses)):
        width = addresses[n, 1]
        buffer = carray(at_address(addresses[n, 0]), (slots, width), np.uint8)
        for r in range(len(target)):
            buffer[target[r]] = buffer[chosen[pool_rows[r]]]


def keep_chosen(keep: Keep, pool_rows: Tensor) -> None:
    """Arguments as in `lenvm_kernels.dispatch.keep_chosen`."""
    addresses, target = keep.kv.addresses.numpy(), keep.target.long().numpy()
    keep_kernel(addresses, keep.chosen.numpy(), pool_rows.numpy(), target, keep.kv.slots)


@compiled(
    *(
        f"UniTuple(i8[::1], 3)(i4[:,:], i8[:], {lengths}[:], i8[:,:], i8, {mask}[:,:,:], i8[:], i8)"
        for lengths in ("i4", "i8")
        for mask in ("i2", "i4")
    )
)
def prefix_kernel(requests, pool_rows, lengths, own, longest, mask, seen, hidden):
    """Slots [R * (K + L)], positions and lengths [R * K] of K candidates in each row; `mask` [R, W, W + C], which shows
    prefixes of `seen` [R] tokens, is changed to show theirs; `hidden` is minus infinity."""
    rows, width = own.shape
    widest = mask.shape[1]
    slots = np.zeros(rows * (width + longest), np.int64)
    positions, after = np.empty(rows * width, np.int64), np.empty(rows * width, np.int64)
    for r in range(rows):
        length, start = np.int64(lengths[r]), r * (width + longest)
        for k in range(width):
            slots[start + k] = own[r, k]
            positions[r * width + k], after[r * width + k] = length, length + 1
        prefix = slots[start + width : start + width + length]
        for j in range(length):
            prefix[j] = requests[pool_rows[r], j]
        for k in range(widest):
            mask[r, k, widest + seen[r] : widest + length] = 0
            mask[r, k, widest + length : widest + seen[r]] = hidden
        seen[r] = length
    return slots, positions, after


def share_prefix(
    lengths: Tensor, pool_rows: Tensor, own: Tensor, requests: Tensor, longest: int, masks: PrefixMasks
) -> PrefixRows:
    """Arguments as in `lenvm_kernels.dispatch.share_prefix`."""
    rows, width = own.shape
    integers, hidden = _BITS[masks.dtype]
    mask = masks.mask.view(integers).numpy()
    tensors = (requests, pool_rows, lengths, own)
    found = prefix_kernel(*(t.numpy() for t in tensors), longest, mask, masks.seen.numpy(), hidden)
    slots, positions, after = map(torch.from_numpy, found)
    return PrefixRows(slots, masks.view(rows, width, longest), positions, after)
