"""The candidate set: which next tokens guidance may choose from.

Guidance comes after everything the host does to the logits (penalties, bias, grammar mask). The set is what the
request's own temperature, top-k, top-p and min-p leave, at most K of it, by probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LARGEST_LOGIT = 1e30
"""What stands for a logit of +inf, so that it can be divided by a temperature."""


@dataclass(frozen=True)
class Candidates:
    """Candidate next tokens of R rows, at most K each, most probable first.

    Attributes:
        token_ids: [R, K] int64.
        log_p: [R, K] float32 base log-probabilities, normalised over the row's candidate set; -inf marks an empty slot.
        is_stop: [R, K] bool, whether the candidate ends the answer.
    """

    token_ids: Tensor
    log_p: Tensor
    is_stop: Tensor

    @cached_property
    def kept(self) -> Tensor:
        """[R, K] bool: slots that hold a candidate. Not to be written to."""
        return self.log_p > -torch.inf

    @cached_property
    def empty(self) -> Tensor:
        """[R, K] bool: slots that hold none. Not to be written to."""
        return ~self.kept


@dataclass(frozen=True)
class SamplingRows:
    """The base model's own sampling settings of R rows, all tensors [R].

    Attributes:
        temperature: float > 0. A greedy request (temperature 0) gives 1 here: its candidates come from the
            distribution at temperature 1, and the arg max of p' is taken afterwards.
        top_k: int64; values >= the vocabulary switch it off.
        top_p: float in (0, 1]; 1 switches it off.
        min_p: float in [0, 1]; 0 switches it off.
        unfiltered: the host knows that no row has a top-k, top-p or min-p; they are not looked at then.
        no_min_p: the host knows that no row has a min-p.
        no_whole_top_p: the host knows that no row has a top-p without a top-k; only those need the probability of the
            whole vocabulary.
        no_temperature: the host knows that every row's temperature is 1.

    The rows of a batch keep their settings from step to step, and with the object what it derives from them.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    unfiltered: bool = False
    no_min_p: bool = False
    no_whole_top_p: bool = False
    no_temperature: bool = False

    @cached_property
    def _within(self) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        return {}

    def within_top_k(self, reach: int, vocabulary: int) -> tuple[Tensor, Tensor]:
        """[R, reach] bool, which of the most probable tokens top-k leaves, and [R, 1] bool, where it is off. Not to be
        written to."""
        key = reach, vocabulary
        if key not in self._within:
            rank = torch.arange(reach, device=self.top_k.device)
            self._within[key] = rank < self.top_k[:, None], self.top_k[:, None] >= vocabulary
        return self._within[key]


def build_candidates(
    logits: Tensor,
    sampling: SamplingRows,
    stop_token_ids: Tensor,
    max_candidates: int,
    ban_stop: Tensor | None = None,
    force_stop: Tensor | None = None,
    reach: int | None = None,
) -> Candidates:
    """Cut the candidate sets. Does not synchronise with the host.

    Filters act as SGLang's do: temperature, then top-k, top-p over the renormalised rest (the token that crosses the
    bound is kept), min-p relative to the most probable token; then the `max_candidates` most probable. Ties go to the
    lower token id, also at the end of `reach` and of the set: a row's candidates do not depend on its batch.

    Args:
        logits: [R, V] after penalties, bias and grammar; -inf for forbidden tokens. A NaN makes its token impossible.
        sampling: the rows' settings.
        stop_token_ids: [R, S] int64 ids that end a row's answer, padded with -1.
        max_candidates: K.
        ban_stop: [R] bool; stop tokens are taken out before the cut (`length_strict` before its bound), unless a
            row has nothing else, because grammar comes first.
        force_stop: [R] bool; only stop tokens stay (`length_strict` at its bound), unless none of them is allowed.
        reach: how many of the most probable tokens need to be ordered: at least the largest top_k that is on, where
            the host knows it. Default all of them. The result is the same; a small reach avoids sorting the
            vocabulary.

    Returns:
        Candidates of shape [R, min(K, V)].
    """
    vocabulary = logits.shape[-1]
    width = min(max_candidates, vocabulary)
    logits = possible(logits.float())
    if ban_stop is not None or force_stop is not None:
        is_stop_token = _stop_mask(stop_token_ids, vocabulary)
        allowed = logits > -torch.inf
    if ban_stop is not None:
        rest = allowed & ~is_stop_token
        use = (ban_stop & rest.any(-1))[:, None]
        logits = logits.masked_fill(use & is_stop_token, -torch.inf)
    if force_stop is not None:
        stops = allowed & is_stop_token
        forced = force_stop & stops.any(-1)
        logits = logits.masked_fill(forced[:, None] & ~is_stop_token, -torch.inf)

    reach = vocabulary if reach is None else min(max(reach, width), vocabulary)
    probabilities = torch.softmax(logits if sampling.no_temperature else logits / sampling.temperature[:, None], dim=-1)
    order = most_likely(logits, reach)
    sorted_p = probabilities.gather(-1, order)
    token_ids = order[:, :width]
    is_stop = (token_ids[..., None] == stop_token_ids[:, None, :]).any(-1)
    if sampling.unfiltered:
        return Candidates(token_ids, torch.log_softmax(sorted_p[:, :width].log(), dim=-1), is_stop)
    in_top_k, no_top_k = sampling.within_top_k(reach, vocabulary)
    within_k = sorted_p * in_top_k
    mass = within_k.cumsum(-1)
    keep = mass - within_k <= sampling.top_p[:, None] * mass[:, -1:].masked_fill(no_top_k, 1.0)
    keep |= sampling.top_p[:, None] >= 1  # the sum may round to more than 1
    if not sampling.no_min_p:
        keep &= sorted_p >= sampling.min_p[:, None] * sorted_p[:, :1]
    log_p = (within_k[:, :width] * keep[:, :width]).log()  # a probability of 0 is an empty slot by itself
    return Candidates(token_ids, torch.log_softmax(log_p, dim=-1), is_stop)


def possible(logits: Tensor) -> Tensor:
    """The logits, NaN as -inf (an impossible token) and nothing above `LARGEST_LOGIT`."""
    return logits.nan_to_num(nan=-torch.inf, posinf=LARGEST_LOGIT, neginf=-torch.inf).clamp(max=LARGEST_LOGIT)


def most_likely(logits: Tensor, count: int) -> Tensor:
    """[R, count] int64 ids of each row's largest logits, the larger first and among equals the lower id; those of
    impossible tokens come last, in any order.

    A top-k of torch leaves it to the device which of several equal logits get in, and equal ones are common in half
    precision. Does not synchronise with a device other than the CPU.

    Args:
        logits: [R, V] float32, without NaN.
        count: at most V.
    """
    if logits.device.type != "cpu" or count == logits.shape[-1]:
        return _by_keys(logits, count)
    # a CPU may be asked whether the choice at the end matters at all
    top, order = logits.topk(count + 1, dim=-1)
    tied = (top[:, count - 1] == top[:, count]) & (top[:, count] > -torch.inf)
    order = order[:, :count].sort(dim=-1).values
    order = order.gather(-1, logits.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
    if tied.any():
        order[tied] = _by_keys(logits[tied], count)
    return order


def _by_keys(logits: Tensor, count: int) -> Tensor:
    """`most_likely` by a top-k of integers that hold logit and id, of which no two are equal."""
    last = logits.shape[-1] - 1
    bits = (logits + 0.0).view(torch.int32)  # -0 is 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # order of the integers = order of the floats
    key = (ordered.long() << 32) | torch.arange(last, -1, -1, device=logits.device)
    return last - (key.topk(count, dim=-1).values & 0xFFFFFFFF)


def keep_mass(candidates: Candidates, mass: float) -> Candidates:
    """Fewer candidates where the base is surer: the most probable that hold `mass` between them, and every stop token.

    Stop tokens stay because near a bound they are what is wanted, however improbable, and scoring them is free.

    Args:
        candidates: [R, K], most probable first.
        mass: in (0, 1]; 1 keeps all. The candidate that crosses it is kept.

    Returns:
        The same slots, the others empty, log-probabilities normalised over the rest. Does not synchronise.
    """
    p = candidates.log_p.exp()
    keep = candidates.kept & ((p.cumsum(-1) - p < mass) | candidates.is_stop)
    log_p = torch.log_softmax(candidates.log_p.masked_fill(~keep, -torch.inf), dim=-1)
    return Candidates(candidates.token_ids, log_p, candidates.is_stop)


def settle_sure_rows(candidates: Candidates, choice: Tensor, min_entropy: float) -> Candidates:
    """Leave only the base model's own draw in rows where the base is sure, so that nothing else is scored there.

    Args:
        candidates: [R, K].
        choice: [R] int64 slot that the base model alone would take.
        min_entropy: nats; a row whose candidate distribution has less is sure.

    Returns:
        The same slots, in sure rows all but one empty. Does not synchronise.
    """
    entropy = torch.special.entr(candidates.log_p.exp()).sum(-1)
    slots = torch.arange(candidates.log_p.shape[-1], device=choice.device)
    others = (entropy < min_entropy)[:, None] & (slots != choice[:, None])
    log_p = torch.log_softmax(candidates.log_p.masked_fill(others, -torch.inf), dim=-1)
    return Candidates(candidates.token_ids, log_p, candidates.is_stop)


def _stop_mask(stop_token_ids: Tensor, vocabulary: int) -> Tensor:
    """[R, V] bool from padded ids."""
    rows = stop_token_ids.shape[0]
    mask = torch.zeros(rows, vocabulary + 1, dtype=torch.bool, device=stop_token_ids.device)
    inside = (stop_token_ids >= 0) & (stop_token_ids < vocabulary)
    return mask.scatter_(1, torch.where(inside, stop_token_ids, vocabulary), True)[:, :vocabulary]
