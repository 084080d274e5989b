"""The one place that chooses between a Triton kernel, a compiled one and the reference.

Triton runs where its tensors are on a CUDA device, or anywhere under TRITON_INTERPRET=1 (Triton's own interpreter,
for tests; Triton reads the variable when it is imported, and so do we). On a CPU, where numba is installed, most
functions have a compiled kernel. Everything else takes plain torch, and so do the few calls that the kernels do not
cover; each function says which. None but `extent` synchronises with the host.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lenvm.candidates import Candidates, SamplingRows
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Scores
from lenvm.heads import LookaheadHead, ValueHead
from lenvm_kernels import reference
from lenvm_kernels.buffers import CandidateRows, DrawBuffers, Keep, PrefixMasks, PrefixRows, RequestTables, SharedRows
from lenvm_kernels.results import TiltSample

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_HAS_NUMBA = importlib.util.find_spec("numba") is not None
HALVES = (torch.bfloat16, torch.float16)
MAX_REACH = 1024
"""Most tokens of a row that the candidate kernel orders; a larger top_k takes the reference."""
MAX_STOPS = 32
"""Most stop tokens of a row; the candidate kernel compares every token it reads with each of them."""
MAX_BINS = 128
"""Most bins of a length distribution that `lookahead_scores` holds in registers."""
MAX_FEATURES = 128
"""Most features of a head for `attend_prefix`: its tiles fit into the shared memory of every GPU since sm_80."""
MAX_CANDIDATES = 128
"""Most candidates of a row that `tilt_sample` holds in registers."""


def uses_triton(tensor: Tensor) -> bool:
    """Whether work on this tensor goes to the Triton kernels."""
    return _HAS_TRITON and (tensor.is_cuda or INTERPRETED)


def uses_numba(tensor: Tensor) -> bool:
    """Whether work on this tensor goes to the kernels that numba compiles."""
    return _HAS_NUMBA and tensor.device.type == "cpu" and not INTERPRETED


def prepare(device: torch.device) -> None:
    """Compile the kernels of a CPU (some seconds the first time on a machine), so that no request waits for it."""
    if uses_numba(torch.empty(0, device=device)):
        from lenvm_kernels.compiled import candidates, rows, tilt  # noqa: F401


def build_candidates(
    logits: Tensor,
    sampling: SamplingRows,
    stop_token_ids: Tensor,
    max_candidates: int,
    guidance: GuidanceRows | None = None,
    reach: int | None = None,
    into: Candidates | None = None,
) -> Candidates:
    """Cut the candidate sets of R rows; `lenvm.candidates.build_candidates` says what a candidate is.

    A top-k of torch and one launch (two where a row has a top-p without a top-k), or a call of the compiled kernel. The
    reference is taken where `reach` is unknown or above `MAX_REACH`, and where a row may have more than `MAX_STOPS`
    stop tokens. All three order tokens by their logits, equal ones by their id, and take the same, so that a row's
    candidates do not depend on its batch. A NaN logit makes its token impossible, and with Triton takes the place of a
    candidate; a row without any possible token comes back empty (all log_p -inf).

    Args:
        logits: [R, V] float after penalties, bias and grammar; -inf for forbidden tokens.
        sampling: the rows' own sampling settings, [R] each.
        stop_token_ids: [R, S] int64 ids that end a row's answer, padded with -1.
        max_candidates: K.
        guidance: what the rows ask for; their `length_strict` bounds ban or force stop tokens (`strict_bounds`).
            None: no bounds.
        reach: how many of the most probable tokens must be ordered, at least the largest top_k that is on.
        into: where to write, [R, min(K, V)], contiguous.

    Returns:
        Candidates of shape [R, min(K, V)]; in the memory of `into` if given.
    """
    covered = reach is not None and max(reach, max_candidates) <= MAX_REACH and stop_token_ids.shape[1] <= MAX_STOPS
    if uses_triton(logits) and covered and logits.shape[0] > 0:
        from lenvm_kernels.fused import candidates as fused

        assert reach is not None
        return fused.build_candidates(logits, sampling, stop_token_ids, max_candidates, guidance, reach, into)
    if uses_numba(logits) and covered:
        from lenvm_kernels.compiled import candidates as compiled

        assert reach is not None
        found = compiled.build_candidates(logits, sampling, stop_token_ids, max_candidates, guidance, reach)
    else:
        found = reference.build_candidates(logits, sampling, stop_token_ids, max_candidates, guidance, reach)
    if into is None:
        return found
    assert into.log_p.shape == found.log_p.shape, "memory of another size"
    return Candidates(*(getattr(into, f.name).copy_(getattr(found, f.name)) for f in fields(Candidates)))


def extent(candidates: Candidates) -> tuple[int, int]:
    """How many of the first slots hold every candidate of R rows, and how many candidates there are. Waits for a
    device: for candidates on a CPU."""
    if uses_numba(candidates.log_p):
        from lenvm_kernels.compiled import candidates as compiled

        used, kept = compiled.extent(candidates.log_p.numpy())
        return used, kept
    return reference.extent(candidates)


def keep_chosen(keep: Keep, pool_rows: Tensor) -> None:
    """Move the KV of candidates chosen last to the slots that their tokens were given; one launch.

    Args:
        keep: the pool, and where from and to.
        pool_rows: [R] int64 rows of the host's request pool.
    """
    if uses_triton(pool_rows):
        from lenvm_kernels.fused import place as fused

        fused.keep_chosen(keep, pool_rows)
    elif uses_numba(pool_rows):
        from lenvm_kernels.compiled import rows as compiled

        compiled.keep_chosen(keep, pool_rows)
    else:
        reference.keep_chosen(keep, pool_rows)


def share_prefix(
    lengths: Tensor, pool_rows: Tensor, own: Tensor, requests: Tensor, longest: int, masks: PrefixMasks
) -> PrefixRows:
    """Where K candidates of R rows stand, for an attention on a CPU that reads each row's prefix once.

    Args:
        lengths: [R] int32 or int64 tokens of each prefix.
        pool_rows: [R] int64 rows of the host's request pool.
        own: [R, K] int64 slots of the candidates; 0, the host's dump, where there is none.
        requests: [P, C] int32 slots of each request's tokens.
        longest: L, at least the largest of `lengths`.
        masks: of the last step; changed.

    Returns:
        PrefixRows; its mask is a view of `masks`.
    """
    masks.fit(own.shape[0], own.shape[1], longest)
    way: Any = reference
    if uses_numba(lengths):
        from lenvm_kernels.compiled import rows as way
    found: PrefixRows = way.share_prefix(lengths, pool_rows, own, requests, longest, masks)
    return found


def attend_prefix(query: Tensor, rows: SharedRows, k_cache: Tensor, v_cache: Tensor, scaling: float) -> Tensor:
    """Attention of K candidates in each of R rows: each sees its row's prefix and itself. One launch, or two.

    Keys and values of a prefix are read once for all its candidates; sums are float32. How a prefix is cut into pieces
    depends on R, so the last bits of a row's result depend on its batch, as those of the forward's matrix products do.
    The reference, which goes from candidate to candidate, is taken for float32 on a GPU, and for heads of more than
    `MAX_FEATURES`.

    Args:
        query: [R * K, Hq, D], adjacent in D; float32, bfloat16 or float16.
        rows: where they stand; the candidates' own keys and values are in the caches already.
        k_cache: [slots, Hkv, D] of the queries' dtype, adjacent in D; Hkv divides Hq.
        v_cache: [slots, Hkv, Dv] likewise.
        scaling: of the logits.

    Returns:
        [R * K, Hq, Dv] of the queries' dtype.
    """
    narrow = max(query.shape[2], v_cache.shape[2]) <= MAX_FEATURES
    if uses_triton(query) and narrow and (INTERPRETED or query.dtype in HALVES):
        from lenvm_kernels.fused import attend as fused

        return fused.attend_prefix(query, rows, k_cache, v_cache, scaling)
    return reference.attend_prefix(query, rows, k_cache, v_cache, scaling)


def place_candidates(
    lengths: Tensor,
    start: Tensor,
    pool_rows: Tensor,
    scratch: Tensor,
    tables: RequestTables | None = None,
    longest: int = 0,
    keep: Keep | None = None,
    into: CandidateRows | None = None,
) -> CandidateRows:
    """Where the K candidates of R rows will stand, and the KV of those chosen last: what a step can do before it knows
    the logits. One launch.

    A candidate's row of `tables.virtual` is written up to its sequence's length, then the candidate's own slot; what
    lies behind is left alone, or overwritten with slots that nobody reads.

    Args:
        lengths: [R] int32 or int64 tokens of each sequence.
        start: [R] int64 tokens before the first that the target counts.
        pool_rows: [R] int64 rows of the host's request pool.
        scratch: [R, K] int64 slots of the candidates.
        tables: the host's request table and ours, where the attention reads one.
        longest: at least the largest of `lengths`, on the host; for `tables`.
        keep: the candidates chosen last, whose KV is moved first.
        into: where to write, for K candidates in at least R rows. Rows behind the R are given no prefix, and slot 0,
            the host's dump, for their candidates.

    Returns:
        CandidateRows; `into` if given.
    """
    if uses_triton(lengths) and scratch.numel() > 0:
        from lenvm_kernels.fused import place as fused

        return fused.place_candidates(lengths, start, pool_rows, scratch, tables, longest, keep, into)
    return reference.place_candidates(lengths, start, pool_rows, scratch, tables, longest, keep, into)


def value_head(hidden: Tensor, head: ValueHead) -> Tensor:
    """z of hidden states (Eq. 7), for inference: two launches, and the hidden layer is never written to memory.

    The products of float32 weights are as exact as float32 on tensor cores (three TF32 products), those of half
    precision weights are exact; sums are float32. A row's z does not depend on its batch. The reference is taken where
    a gradient is wanted, and for parameters of another dtype than float32 or the hidden states' own.

    Args:
        hidden: [..., H] float32, bfloat16 or float16.
        head: the checkpoint's value head.

    Returns:
        z [...] float32.
    """
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or head.w1.requires_grad)
    covered = head.w1.dtype == torch.float32 or (head.w1.dtype == hidden.dtype and hidden.dtype in HALVES)
    covered = covered and hidden.dtype in (torch.float32, *HALVES) and hidden.numel() > 0
    if uses_triton(hidden) and covered and not differentiable:
        from lenvm_kernels.fused import value_head as fused

        return fused.value_head(hidden, head)
    return head(hidden)


def lookahead_scores(
    states: Tensor, slots: Tensor, token_ids: Tensor, head: LookaheadHead, lenvm: LenvmConfig, value: bool = True
) -> Scores:
    """Scores of the states after each of K tokens in R rows, from the states before them; for inference.

    Two launches: W1 h of the rows, then E[x], SiLU, W2, softmax over bins and z of each token in registers. Products
    are as exact as float32 on tensor cores, or exact where state and W1 share a half precision; sums are float32, z is
    float64 inside. A row's scores do not depend on its batch. The reference is taken where a gradient is wanted, for a
    head without a table of its own, for more than `MAX_BINS` bins, and for a W1 of another dtype than float32 or the
    states' own.

    Args:
        states: [S, H] the states kept, float32, bfloat16 or float16.
        slots: [R] int64, each row's state.
        token_ids: [R, K] int64, all within the vocabulary.
        head: the checkpoint's lookahead head.
        lenvm: gamma and bins.
        value: whether z is wanted; it is zeros otherwise.

    Returns:
        Scores: z [R, K] and log q [R, K, B], float32.
    """
    covered = head.embedding is not None and head.bins <= MAX_BINS and token_ids.numel() > 0
    covered = covered and (head.w1.dtype == torch.float32 or (head.w1.dtype == states.dtype and states.dtype in HALVES))
    differentiable = torch.is_grad_enabled() and (states.requires_grad or head.w1.requires_grad)
    if uses_triton(states) and covered and not differentiable:
        from lenvm_kernels.fused import lookahead as fused

        return fused.lookahead_scores(states, slots, token_ids, head, lenvm, value)
    return reference.lookahead_scores(states, slots, token_ids, head, lenvm, value)


def tilt_sample(
    candidates: Candidates,
    scores: Scores,
    guidance: GuidanceRows,
    lenvm: LenvmConfig,
    seed: Tensor,
    greedy: Tensor,
    present: Collection[Control] | None = None,
    statistics: bool = True,
    lengths: bool = True,
    into: DrawBuffers | None = None,
    ruled_by: Tensor | None = None,
) -> TiltSample:
    """Guide and draw R rows, each after its own rule: `lenvm.guidance.guide`, then `lenvm.sampler.draw`.

    One launch, or one call of the compiled kernel. The noise is the sampler's own, keyed by (seed, tokens emitted,
    token id), so kernel and reference draw the same tokens wherever their log p' agree; the kernels work in float64 per
    candidate, Triton's in float32 per bin. Rows of more than `MAX_CANDIDATES` candidates take the reference on a GPU. A
    checkpoint without a length head computes its log-normal with the core's torch first (only if the posterior is
    `present`).

    Args:
        candidates: the sets, [R, K]; a row's count is the number of its slots with log_p > -inf.
        scores: of the states after each candidate; entries of stop tokens and empty slots are not read.
        guidance: what each row asks for.
        lenvm: gamma, bins and spread of the checkpoint.
        seed: [R] int64 keys of the draw's noise.
        greedy: [R] bool, or int64 of a table, take the arg max of p' instead of a sample.
        present: the controls that occur in `guidance`, where the host knows them.
        statistics: also give value, expected value, KL to the base and status (free in Triton's kernel).
        lengths: also give the predicted remaining length (free in Triton's kernel).
        into: where the tokens and slots drawn are written, in the same launch.
        ruled_by: [R] int64, which row of `guidance` (but for `emitted`, [R]), `seed` and `greedy` each row is ruled by,
            where those are a table of more rows. None: row by row.

    Returns:
        TiltSample.
    """
    rows, slots = candidates.log_p.shape
    if uses_triton(candidates.log_p) and 0 < slots <= MAX_CANDIDATES and rows > 0:
        from lenvm_kernels.fused import tilt as fused

        return fused.tilt_sample(candidates, scores, guidance, lenvm, seed, greedy, present, into, ruled_by)
    if ruled_by is not None:
        guidance, seed, greedy = guidance.ruling(ruled_by), seed[ruled_by], greedy[ruled_by].bool()
    way: Any = reference
    if uses_numba(candidates.log_p) and slots > 0:
        from lenvm_kernels.compiled import tilt as way
    sample: TiltSample = way.tilt_sample(
        candidates, scores, guidance, lenvm, seed, greedy, present, statistics, lengths, into
    )
    return sample if into is None or into.results is None else sample.moved(into.results)
