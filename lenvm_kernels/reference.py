"""The kernels' references: the core's own functions, put together in the shape of the kernels. Plain torch."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lenvm import candidates as core
from lenvm.candidates import Candidates, SamplingRows
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Scores, guide_rows, predicted_lengths, strict_bounds
from lenvm.heads import LookaheadHead
from lenvm.lognormal import lognormal_log_q
from lenvm.lookahead import scores_from_distribution
from lenvm.sampler import draw
from lenvm_kernels.buffers import CandidateRows, DrawBuffers, Keep, PrefixMasks, PrefixRows, RequestTables, SharedRows
from lenvm_kernels.results import Status, TiltSample


def build_candidates(
    logits: Tensor,
    sampling: SamplingRows,
    stop_token_ids: Tensor,
    max_candidates: int,
    guidance: GuidanceRows | None,
    reach: int | None,
) -> Candidates:
    """`lenvm.candidates.build_candidates` under the strict bounds of `guidance`."""
    ban, force = (None, None) if guidance is None else strict_bounds(guidance)
    return core.build_candidates(logits, sampling, stop_token_ids, max_candidates, ban, force, reach)


def extent(candidates: Candidates) -> tuple[int, int]:
    """By the slots that any row uses."""
    used = candidates.kept.any(0).nonzero()
    return (int(used[-1]) + 1 if len(used) else 0), int(candidates.kept.sum())


def keep_chosen(keep: Keep, pool_rows: Tensor) -> None:
    """Buffer by buffer."""
    source, target = keep.chosen[pool_rows], keep.target.long()
    for buffer in keep.kv.buffers:
        buffer.index_copy_(0, target, buffer.index_select(0, source))


def share_prefix(
    lengths: Tensor, pool_rows: Tensor, own: Tensor, requests: Tensor, longest: int, masks: PrefixMasks
) -> PrefixRows:
    """Everything anew."""
    rows, width = own.shape
    widest = masks.mask.shape[1]
    outside = torch.arange(masks.mask.shape[2] - widest, device=lengths.device) >= lengths[:, None]  # [R, C]
    masks.mask[:rows, :, widest:] = torch.where(outside, -torch.inf, 0.0)[:, None]
    masks.seen[:rows] = lengths
    prefix = requests[pool_rows, :longest].long().masked_fill_(outside[:, :longest], 0)
    slots = torch.cat([own, prefix], dim=1).flatten()
    positions = lengths.long()[:, None].expand(rows, width).reshape(-1)
    return PrefixRows(slots, masks.view(rows, width, longest), positions, positions + 1)


def attend_prefix(query: Tensor, rows: SharedRows, k_cache: Tensor, v_cache: Tensor, scaling: float) -> Tensor:
    """One candidate after another, in the dtype of the query."""
    slots = rows.own.shape[1]
    out = query.new_empty(query.shape[0], query.shape[1], v_cache.shape[2])
    for i, one in enumerate(query):
        row = i // slots
        prefix = rows.requests[rows.pool_rows[row], : int(rows.lengths[row])].long()
        seen = torch.cat([prefix, rows.own[row, i % slots, None]])
        group = query.shape[1] // k_cache.shape[1]
        keys, values = (cache[seen].to(query.dtype).repeat_interleave(group, dim=1) for cache in (k_cache, v_cache))
        weight = (torch.einsum("hd,nhd->hn", one, keys) * scaling).softmax(-1)
        out[i] = torch.einsum("hn,nhd->hd", weight, values)
    return out


def place_candidates(
    lengths: Tensor,
    start: Tensor,
    pool_rows: Tensor,
    scratch: Tensor,
    tables: RequestTables | None,
    longest: int,
    keep: Keep | None,
    into: CandidateRows | None,
) -> CandidateRows:
    """Operator by operator; of the tables also what lies behind a row's own length is copied."""
    rows, width = scratch.shape
    if keep is not None:
        keep_chosen(keep, pool_rows)
    prefix = lengths.long()
    positions = prefix[:, None].expand(rows, width).reshape(-1)
    if tables is not None:
        virtual = tables.virtual[: rows * width]
        virtual.view(rows, width, -1)[..., :longest] = tables.requests[pool_rows, None, :longest]
        virtual.scatter_(1, positions[:, None], scratch.reshape(-1, 1).to(virtual.dtype))
    found = CandidateRows(positions, positions + 1, scratch.reshape(-1), prefix, pool_rows, prefix - start)
    if into is None:
        return found
    for name, here, numbers in zip(found._fields, into, found, strict=True):
        here.fill_(1 if name == "lengths" else 0)
        here[: len(numbers)] = numbers
    return into


def lookahead_scores(
    states: Tensor, slots: Tensor, token_ids: Tensor, head: LookaheadHead, lenvm: LenvmConfig, value: bool
) -> Scores:
    """The head on the rows' states, and `lenvm.lookahead.scores_from_distribution` of what it says."""
    log_q = torch.log_softmax(head(states[slots], token_ids), dim=-1)
    return scores_from_distribution(log_q, lenvm, value)


def tilt_sample(
    candidates: Candidates,
    scores: Scores,
    guidance: GuidanceRows,
    lenvm: LenvmConfig,
    seed: Tensor,
    greedy: Tensor,
    present: Collection[Control] | None,
    statistics: bool,
    lengths: bool,
    into: DrawBuffers | None = None,
) -> TiltSample:
    """`guide`, `draw` and `predicted_lengths`, and the statistics of the result."""
    log_p, fell_back = guide_rows(candidates, scores, guidance, lenvm, present)
    slot = draw(log_p, candidates.token_ids, seed, guidance.emitted, greedy)

    def chosen(values: Tensor) -> Tensor:
        """Of the slot drawn: from [R, K] or [R, K, B]."""
        index = slot.view(-1, *[1] * (values.dim() - 1)).expand(-1, 1, *values.shape[2:])
        return values.gather(1, index)[:, 0]

    out = TiltSample(log_p, slot, chosen(candidates.token_ids))
    write_draw(into, out)
    if lengths:
        taken = Candidates(*(chosen(t)[:, None] for t in (candidates.token_ids, candidates.log_p, candidates.is_stop)))
        log_q = None if scores.length_log_q is None else chosen(scores.length_log_q)[:, None]
        length = predicted_lengths(taken, Scores(chosen(scores.z)[:, None], log_q), lenvm)[:, 0]
        out = out._replace(length=length)
    if not statistics:
        return out
    kept = candidates.kept
    value = -torch.sigmoid(scores.z.double()).masked_fill(candidates.is_stop | ~kept, 0.0)
    guided = log_p.double().masked_fill(~kept, -torch.inf).log_softmax(-1)
    base = candidates.log_p.double().masked_fill(~kept, -torch.inf).log_softmax(-1)
    p = guided.exp()
    alive = p > 0
    kl = torch.where(alive, p * (guided - base), 0.0).sum(-1).clamp(min=0.0)
    return out._replace(
        value=chosen(value).float(),
        expected_value=torch.where(alive, p * value, 0.0).sum(-1).float(),
        kl=kl.float(),
        status=_status(candidates, scores, guidance, lenvm, fell_back),
    )


def write_draw(into: DrawBuffers | None, sample: TiltSample) -> None:
    """Make the rows one-hot in their tokens, and note the slots of the candidates drawn."""
    if into is None:
        return
    if into.logits is not None:
        rows = torch.arange(len(sample.token_id), device=into.logits.device) if into.rows is None else into.rows
        into.logits.index_fill_(0, rows, -torch.inf)
        into.logits[rows, sample.token_id] = 0.0
    if into.chosen is not None:
        into.chosen.index_copy_(0, into.pool_rows, into.scratch.gather(1, sample.slot[:, None])[:, 0])


def _status(
    candidates: Candidates, scores: Scores, guidance: GuidanceRows, lenvm: LenvmConfig, fell_back: Tensor
) -> Tensor:
    """[R] int32 `Status` bits."""
    read = candidates.kept & ~candidates.is_stop
    posterior = guidance.control == Control.POSTERIOR
    by_value = (guidance.control != Control.NONE) & ~posterior
    log_q = scores.length_log_q if scores.length_log_q is not None else lognormal_log_q(scores.z, lenvm)[0]
    bad_q = (log_q.isnan() | log_q.isposinf()).any(-1)
    bad = (by_value & (scores.z.isnan() & read).any(-1)) | (posterior & (bad_q & read).any(-1))
    empty = ~candidates.kept.any(-1)
    bits = empty * int(Status.EMPTY) + (~empty & bad) * int(Status.BAD_SCORES)
    return (bits + (~empty & ~bad & posterior & fell_back) * int(Status.VANISHED)).int()
