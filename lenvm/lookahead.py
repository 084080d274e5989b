"""What the lookahead head's distributions are good for: scores of candidates, and the length at the prompt."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lenvm.bins import LengthBins
from lenvm.candidates import Candidates
from lenvm.definitions import decay_nats
from lenvm.format import LenvmConfig
from lenvm.guidance import Scores


def scores_from_distribution(log_q: Tensor, lenvm: LenvmConfig, value: bool = True) -> Scores:
    """Scores of states of which only the length distribution is known; does not synchronise with the host.

    The value logit that the other rules read (hard, soft, tilting) is that of the distribution: u = 1 - E[gamma^n],
    the mean over q of the return's Eq. 2, z = ln u - ln(1 - u).

    Args:
        log_q: [..., B] float32 log-probabilities of the checkpoint's bins.
        lenvm: gamma and bins.
        value: whether z is wanted; it is zeros otherwise.
    """
    if not value:
        return Scores(z=_zero(log_q.device).expand(log_q.shape[:-1]), length_log_q=log_q)
    per_bin = log_discounts(lenvm.length_bins.centres, lenvm.gamma, log_q.device)
    log_discount = torch.logsumexp(log_q.float() + per_bin, dim=-1)  # ln E[gamma^n] <= ln gamma < 0
    return Scores(z=torch.log(-torch.expm1(log_discount)) - log_discount, length_log_q=log_q)


@lru_cache(maxsize=8)
def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def log_discounts(centres: tuple[int, ...], gamma: float, device: torch.device) -> Tensor:
    """ln E[gamma^n] within each bin, [B] float32; kept, because a server asks at every token."""
    bins = LengthBins.cached(centres)
    n = torch.arange(bins.longest + 1, dtype=torch.float64)
    inside = bins.decode_matrix().double() @ torch.exp(-decay_nats(gamma) * n)
    return inside.log().float().to(device)


def prompt_distribution(candidates: Candidates, log_q: Tensor, bins: LengthBins) -> Tensor:
    """P(n) before a token from the distributions after each candidate: sum_x p(x) q(n - 1 | s + x), p(stop) at n = 1.

    Args:
        candidates: [R, K] next tokens with their probabilities p(x), which sum to 1 over the set.
        log_q: [R, K, B] of the states after them; entries of stop tokens and empty slots are not read.
        bins: of log_q.

    Returns:
        [R, N + 2] float32, n = 0..N + 1 with N the longest centre; each row sums to 1.
    """
    after = bins.pmf(log_q)  # [R, K, N + 1]
    ended = torch.zeros_like(after)
    ended[..., 0] = 1.0
    after = torch.where(candidates.is_stop[..., None], ended, after)
    after = torch.where(candidates.kept[..., None], after, torch.zeros_like(after))  # an empty slot may hold NaN
    before = torch.einsum("rk,rkn->rn", candidates.log_p.exp(), after)
    return torch.nn.functional.pad(before, (1, 0))


def prompt_summary(pmf: Tensor, quantiles: tuple[float, ...]) -> Tensor:
    """Mean and quantiles in tokens of P(n) [R, N + 2], [R, 1 + len(quantiles)] float32."""
    n = torch.arange(pmf.shape[-1], dtype=pmf.dtype, device=pmf.device)
    reached = pmf.cumsum(-1)
    # 1e-6: the float32 sum may stop just short of 1
    found = [(reached < p - 1e-6).sum(-1).clamp(max=pmf.shape[-1] - 1).to(pmf.dtype) for p in quantiles]
    return torch.stack([pmf @ n, *found], dim=-1)
