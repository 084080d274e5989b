"""`lookahead_scores`: the length distribution after each candidate, and its z, from one hidden state a row.

Two launches. W1 h is the same for all candidates of a row, so it comes first; then a program takes up to `BLOCK_K`
candidates of one row: it gathers E[x], and SiLU, W2, softmax over bins and z stay in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lenvm.format import LenvmConfig
from lenvm.guidance import Scores
from lenvm.heads import LookaheadHead
from lenvm.lookahead import log_discounts
from lenvm_kernels.fused.common import NEG_INF, product_tile, rowwise

BLOCK_M, BLOCK_N, BLOCK_H = 32, 16, 64
"""Rows, units of the head and features of the state in a tile of W1 h. Fixed, so that a row's sums do not depend on the
batch; few units a program, because W1 is what is read, and many programs read it faster."""
BLOCK_K, BLOCK_R = 16, 64
"""Candidates of a program, and units of the head that it takes at a time."""
WARPS, STAGES = 4, 3


@triton.jit
def state_kernel(
    STATES, SLOT, W1, B1, OUT, M, H, R, states_row, w1_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """OUT[m, r] = w1_r . STATES[SLOT[m]] + b1_r."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_units = rows < M, units < R
    slot = tl.load(SLOT + rows, mask=in_rows, other=0)
    inner = product_tile(
        STATES, slot * states_row, in_rows, W1, w1_row, units, in_units, H, BLOCK_M, BLOCK_N, BLOCK_H, UPCAST
    )
    inner += tl.load(B1 + units, mask=in_units, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + rows[:, None].to(tl.int64) * R + units[None, :], inner, mask=in_rows[:, None] & in_units[None, :])


@triton.jit
def scores_kernel(
    STATE, TOKEN, TABLE, W2, B2, DISCOUNT, LOG_Q, Z, K, R, B, token_row, table_row, w2_row,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """LOG_Q[m, k] = log softmax(w2 SiLU(STATE[m] + TABLE[x_k]) + b2), and Z[m, k] of that distribution if VALUE."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    bins, units = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_R)
    in_k, in_bins = k < K, bins < B
    token = tl.load(TOKEN + row * token_row + k, mask=in_k, other=0)
    logits = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + units
        in_units = r < R
        state = tl.load(STATE + row * R + r, mask=in_units, other=0.0)
        e = tl.load(TABLE + token[:, None] * table_row + r[None, :], mask=in_k[:, None] & in_units[None, :], other=0.0)
        x = state[None, :] + e.to(tl.float32)
        w = tl.load(
            W2 + bins[None, :].to(tl.int64) * w2_row + r[:, None], mask=in_bins[None, :] & in_units[:, None], other=0.0
        )
        logits = tl.dot(x / (1.0 + tl.exp(-x)), w.to(tl.float32), logits, input_precision="tf32x3")
    logits += tl.load(B2 + bins, mask=in_bins, other=0.0).to(tl.float32)[None, :]
    logits = tl.where(in_bins[None, :], logits, NEG_INF)
    log_q = logits - tl.max(logits, 1)[:, None]
    log_q = log_q - tl.log(tl.sum(tl.exp(log_q), 1))[:, None]
    at = row * K + k
    tl.store(LOG_Q + at[:, None] * B + bins[None, :], log_q, mask=in_k[:, None] & in_bins[None, :])
    z = tl.zeros((BLOCK_K,), tl.float64)
    if VALUE:
        # u = 1 - E[gamma^n]; E[gamma^n] <= gamma < 1, and float64 keeps the difference of a gamma close to 1
        kept = tl.exp(log_q.to(tl.float64) + tl.load(DISCOUNT + bins, mask=in_bins, other=0.0).to(tl.float64)[None, :])
        discount = tl.sum(kept, 1)
        z = tl.log(1.0 - discount) - tl.log(discount)
    tl.store(Z + at, z.to(tl.float32), mask=in_k)


def lookahead_scores(
    states: Tensor,
    slots: Tensor,
    token_ids: Tensor,
    head: LookaheadHead,
    lenvm: LenvmConfig,
    value: bool,
    upcast: bool | None = None,
) -> Scores:
    """Launch; arguments as in `lenvm_kernels.dispatch.lookahead_scores`.

    Args:
        upcast: multiply W1 h in float32. Default: where the dtypes ask for it, and in the interpreter, whose half
            precision products are wrong.
    """
    from lenvm_kernels.dispatch import INTERPRETED

    assert head.embedding is not None, "the dispatch point sends no other heads"
    states, w1, w2, table = rowwise(states), rowwise(head.w1), rowwise(head.w2), rowwise(head.embedding)
    token_ids = rowwise(token_ids)
    rows, count = token_ids.shape
    if upcast is None:
        upcast = INTERPRETED or w1.dtype == torch.float32
    state = torch.empty(rows, head.rank, dtype=torch.float32, device=states.device)
    state_kernel[(triton.cdiv(rows, BLOCK_M), triton.cdiv(head.rank, BLOCK_N))](
        states, slots, w1, head.b1, state, rows, head.hidden_size, head.rank, states.stride(0), w1.stride(0),
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_H=BLOCK_H, UPCAST=upcast, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    log_q = torch.empty(rows, count, head.bins, dtype=torch.float32, device=states.device)
    z = torch.empty(rows, count, dtype=torch.float32, device=states.device)
    discount = log_discounts(lenvm.length_bins.centres, lenvm.gamma, states.device)
    scores_kernel[(rows, triton.cdiv(count, BLOCK_K))](
        state, token_ids, table, w2, head.b2, discount, log_q, z, count, head.rank, head.bins, token_ids.stride(0),
        table.stride(0), w2.stride(0), BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R,
        BLOCK_B=max(16, triton.next_power_of_2(head.bins)), VALUE=value, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return Scores(z, log_q)
