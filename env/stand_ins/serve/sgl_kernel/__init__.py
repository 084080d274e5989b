"""Plain-torch stand-in for the CPU functions of SGLang's `sgl_kernel`, for machines without a GPU.

Why it exists: the `sglang-kernel` wheels hold CUDA kernels only, and SGLang's CPU engine imports six small functions of
`sgl_kernel` at start. They only move KV slot numbers and KV rows about, so torch does them exactly.
`env/build.py` copies this package into the CPU serving environment; it refuses to be imported under a CUDA torch, where
the real package belongs. Every function that is not here raises `NotImplementedError` when it is called.

The signatures are SGLang's; functions write into their output argument and return None, as the originals do. "Slot" is
an index into the KV pool. R requests, P columns of the slot table.
"""

import ctypes
from collections.abc import Callable
from typing import NoReturn

import torch

if torch.version.cuda is not None:
    raise ImportError(
        f"this `sgl_kernel` is LenVM's CPU stand-in, and torch {torch.__version__} is built for CUDA "
        f"{torch.version.cuda}; install SGLang in an environment of its own (pip install 'lenvm[serve]')"
    )

__version__ = "0.0.0+lenvm.cpu"


def _ranges(starts: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row number and column of every cell of the ranges [starts[i], starts[i] + lengths[i]), one after the other.

    starts, lengths: int [R]. Returns (rows, columns), int64 [sum(lengths)] each. Negative lengths count as empty.
    """
    starts, lengths = starts.long(), lengths.long().clamp(min=0)
    rows = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
    ends = lengths.cumsum(0)
    within = torch.arange(int(ends[-1]) if ends.numel() else 0) - (ends - lengths)[rows]
    return rows, starts[rows] + within


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Enter newly allocated slots into the slot table.

    For request i, `req_to_token[req_pool_indices[i], start_offset[i]:end_offset[i]]` takes the next
    `end_offset[i] - start_offset[i]` entries of `out_cache_loc`.

    req_pool_indices, start_offset, end_offset: int [R]; req_to_token: int [requests, P], written;
    out_cache_loc: int [>= sum of the range lengths]; pool_len: P (implied by req_to_token here).
    """
    rows, columns = _ranges(start_offset, end_offset - start_offset)
    req_to_token[req_pool_indices.long()[rows], columns] = out_cache_loc[: rows.numel()].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Read the slots of one range a request out of the slot table, packed: the inverse of the function above.

    Shapes as in `assign_req_to_token_pool_cpu`; out_cache_loc is written, entries beyond the ranges stay as they are.
    """
    rows, columns = _ranges(start_offset, end_offset - start_offset)
    out_cache_loc[: rows.numel()] = req_to_token[req_pool_indices.long()[rows], columns].to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    speculative_num_steps: int,
) -> None:
    """Read the `topk * speculative_num_steps` slots that follow each sequence out of the slot table, packed.

    req_pool_indices, seq_lens: int [R]; req_to_token: int [requests, P]; out_cache_loc: int [R * topk * steps],
    written.
    """
    ends = seq_lens + topk * speculative_num_steps
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, ends, out_cache_loc, pool_len)


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor, accept_lens: torch.Tensor, bonus_tokens: torch.Tensor, accept_stride: int
) -> None:
    """`bonus_tokens[i]` = the last accepted token of request i.

    accept_tokens: int [R * accept_stride] (any shape with that many elements); accept_lens: int [R], each in
    1..accept_stride; bonus_tokens: int [>= R], written.
    """
    requests = accept_lens.numel()
    last = torch.arange(requests) * accept_stride + accept_lens.long() - 1
    bonus_tokens[:requests] = accept_tokens.flatten()[last].to(bonus_tokens.dtype)


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Pack `out_cache_loc[j]` for every j of accept_index, in order, that is not -1.

    accept_index: int, any shape; out_cache_loc: int [slots]; accept_out_cache_loc: int [>= accepted], written.
    """
    accepted = accept_index.flatten()
    accepted = accepted[accepted > -1].long()
    accept_out_cache_loc[: accepted.numel()] = out_cache_loc[accepted].to(accept_out_cache_loc.dtype)


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Copy KV rows from slots `src_loc` to slots `tgt_loc` in every buffer, as if all were read before any is written.

    data_ptrs: uint64 [buffers], addresses of slot 0 of contiguous CPU buffers (keys and values of every layer);
    strides: int [buffers], bytes a slot; tgt_loc, src_loc: int [N]. Overlapping moves are exact: the gather on the
    right of the assignment is a copy. The caller vouches for addresses and slots, as it does with the CUDA kernel.

    Raises ValueError if tgt_loc and src_loc differ in length.
    """
    if tgt_loc.numel() != src_loc.numel():
        raise ValueError(f"tgt_loc has {tgt_loc.numel()} slots and src_loc {src_loc.numel()}; they must be pairs")
    if tgt_loc.numel() == 0:
        return
    target, source = tgt_loc.long(), src_loc.long()
    slots = int(torch.maximum(target.max(), source.max())) + 1
    for address, row_bytes in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (slots * row_bytes)).from_address(address)
        rows = torch.frombuffer(memory, dtype=torch.uint8).view(slots, row_bytes)
        rows[target] = rows[source]


OPERATORS = (
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
)
"""`torch.ops.sgl_kernel.<name>`: operators of the recurrent Qwen3.5, which SGLang's image processor of every Qwen-VL
imports."""


def _missing(name: str) -> Callable[..., NoReturn]:
    """Something that can be imported and raises when it is called."""

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} is a CUDA kernel and LenVM's CPU stand-in does not have it; "
            "turn the feature that called it off, or use a GPU"
        )

    missing.__name__ = missing.__qualname__ = name
    return missing


for _name in OPERATORS:
    setattr(torch.ops.sgl_kernel, _name, _missing(_name))


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """Anything else: importable, since SGLang imports whole lists of kernels, and an error when called."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(name)
