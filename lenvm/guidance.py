"""The guidance rules: p'(x) over a candidate set, from base log-probabilities and the scores of the next states.

Plain torch, batched over rows that may each follow another rule; the oracle for anything faster. Notation: T target,
t tokens already emitted, m = T - t - 1 tokens that a candidate should leave, u = 1 - gamma^n = sigmoid(z). A stop
token leaves exactly 0 tokens, whatever the network says.

Sign of tilting: **beta < 0 is shorter, beta > 0 longer**. (With V = -sigmoid(z), the paper's Eq. 12 taken literally
has it the other way round, against its own text.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lenvm.bins import LengthBins
from lenvm.candidates import Candidates
from lenvm.definitions import decay_nats, length_from_logit
from lenvm.format import LenvmConfig
from lenvm.lognormal import lognormal_log_q

FLOOR = 1e-30
"""Added to a posterior weight: a candidate the model calls impossible keeps a trace."""
OVERRUN_TOKENS = 3.0
"""Past the bound every further token costs a factor exp(-1/3): the shortest ending that still reads well."""
MIN_TOLERANCE_TOKENS = 0.7
_TILT_STEPS = 80
_TILT_LIMIT = 1e6


class Mode(IntEnum):
    """`length_mode`."""

    EQUAL_TO = 0
    AT_MOST = 1
    AT_LEAST = 2


class Control(IntEnum):
    """`length_control`; NONE scores a row without steering it, BIAS is `length_bias`."""

    NONE = 0
    POSTERIOR = 1
    HARD = 2
    SOFT = 3
    BIAS = 4


@dataclass(frozen=True)
class Scores:
    """What the length value model says of the state after each candidate.

    Attributes:
        z: [R, K] float32 value logit.
        length_log_q: [R, K, B] float32 log-probabilities over the checkpoint's bins; None if it has no length head.
    """

    z: Tensor
    length_log_q: Tensor | None = None


@dataclass(frozen=True)
class GuidanceRows:
    """What R rows ask for; all tensors [R].

    Attributes:
        mode: int64 `Mode`.
        control: int64 `Control`.
        target: int64 T, tokens, stop token included (ignored by NONE and BIAS).
        emitted: int64 t, tokens already emitted.
        sharpness: float32 exponent a of the posterior.
        tolerance: float32 in [0, 1), relative width of the posterior's kernel in `equal_to`.
        strict: bool `length_strict`.
        bias: float32 beta of exponential tilting.
    """

    mode: Tensor
    control: Tensor
    target: Tensor
    emitted: Tensor
    sharpness: Tensor
    tolerance: Tensor
    strict: Tensor
    bias: Tensor

    @property
    def left(self) -> Tensor:
        """m = T - t - 1 [R] int64: the tokens a candidate should leave; negative past the bound."""
        return self.target - self.emitted - 1

    def select(self, index: Tensor) -> GuidanceRows:
        """The rows of an index or mask."""
        return GuidanceRows(**{name: value[index] for name, value in vars(self).items()})

    def ruling(self, index: Tensor) -> GuidanceRows:
        """The rows of an index, where these are a table and `emitted` alone is of those rows already."""
        chosen = {name: value if name == "emitted" else value[index] for name, value in vars(self).items()}
        return GuidanceRows(**chosen)


def strict_bounds(rows: GuidanceRows) -> tuple[Tensor, Tensor]:
    """What `length_strict` does to the stop tokens *before* candidates are cut.

    Returns:
        ban_stop [R] bool: stopping now would be too short (equal_to, at_least).
        force_stop [R] bool: only stopping now keeps the bound (equal_to, at_most).
    """
    targeted = rows.strict & (rows.control != Control.NONE) & (rows.control != Control.BIAS)
    ban = targeted & (rows.mode != Mode.AT_MOST) & (rows.left > 0)
    force = targeted & (rows.mode != Mode.AT_LEAST) & (rows.left <= 0)
    return ban, force


class Guided(NamedTuple):
    """What the rules make of R rows.

    Attributes:
        log_p: [R, K] float32 log p' of each candidate, normalised; -inf in empty slots and for excluded candidates.
        fell_back: [R] bool, the rule gave no distribution (NaN scores, no candidate with a weight) and the row keeps p.
    """

    log_p: Tensor
    fell_back: Tensor


def guide(
    candidates: Candidates,
    scores: Scores,
    rows: GuidanceRows,
    lenvm: LenvmConfig,
    present: Collection[Control] | None = None,
) -> Tensor:
    """`guide_rows`, the distributions alone."""
    return guide_rows(candidates, scores, rows, lenvm, present).log_p


def guide_rows(
    candidates: Candidates,
    scores: Scores,
    rows: GuidanceRows,
    lenvm: LenvmConfig,
    present: Collection[Control] | None = None,
) -> Guided:
    """The distribution p' over each candidate set.

    A row whose result is not a distribution (NaN scores, every candidate excluded) keeps p.

    Args:
        candidates: the sets, from `build_candidates` (with `strict_bounds` applied there).
        scores: of the states after each candidate; entries of stop tokens and empty slots are not read.
        rows: what each row asks for.
        lenvm: gamma, bins and spread of the checkpoint.
        present: the controls that occur in `rows`, where the host knows them: the other rules are not computed.

    Returns:
        Log-probabilities and the rows that fell back. Does not synchronise with the host.
    """
    log_p = candidates.log_p
    result = log_p
    for control, rule in RULES.items():
        if present is not None and control not in present:
            continue
        guided = rule(candidates, scores, rows, lenvm)
        alone = present is not None and len(present) == 1
        result = guided if alone else torch.where((rows.control == control)[:, None], guided, result)
    result = result.masked_fill(candidates.empty, -torch.inf)
    guided = torch.log_softmax(result, dim=-1)
    fell_back = guided[:, 0].isnan()  # as is the whole row then
    return Guided(torch.where(fell_back[:, None], log_p, guided), fell_back)


def predicted_lengths(candidates: Candidates, scores: Scores, lenvm: LenvmConfig) -> Tensor:
    """Predicted remaining length after each candidate, [R, K] float32 tokens: E[n] of the length distribution, or the
    inverted value; 0 for a stop token."""
    if scores.length_log_q is not None:
        n = lenvm.length_bins.expected(scores.length_log_q)
    else:
        n = length_from_logit(scores.z, lenvm.gamma)
    return n.masked_fill(candidates.is_stop, 0.0)


def posterior(candidates: Candidates, scores: Scores, rows: GuidanceRows, lenvm: LenvmConfig) -> Tensor:
    """Posterior control: p'(x) ~ p(x) (w(x) + floor)^a with w(x) = sum_n q(n | s+x) K(n), w(stop) = K(0).

    The base model conditioned on the length. If every weight of a row vanishes, the row is NaN and `guide` keeps p.
    """
    weight = posterior_weights(candidates, scores, rows, lenvm)
    vanished = weight.amax(-1, keepdim=True) <= FLOOR
    tilted = torch.addcmul(candidates.log_p, rows.sharpness[:, None], (weight + FLOOR).log())
    return tilted.masked_fill_(vanished, torch.nan)


def posterior_weights(candidates: Candidates, scores: Scores, rows: GuidanceRows, lenvm: LenvmConfig) -> Tensor:
    """w(x) = sum_n q(n | s+x) K(n) of each candidate, w(stop) = K(0), [R, K] float32; 0 in empty slots."""
    if scores.length_log_q is not None:
        log_q, bins = scores.length_log_q, lenvm.length_bins
    else:
        log_q, bins = lognormal_log_q(scores.z, lenvm)
    at_zero, per_bin = kernel_per_bin(rows, bins)
    weight = torch.bmm(log_q.exp(), per_bin[:, :, None])[..., 0]
    return torch.where(candidates.is_stop, at_zero[:, None], weight).masked_fill_(candidates.empty, 0.0)


def kernel_per_bin(rows: GuidanceRows, bins: LengthBins) -> tuple[Tensor, Tensor]:
    """K(0) [R] and sum_n DEC[b, n] K(n) [R, B] of each row, float32: what `length_kernel` says, bin by bin.

    Without a tolerance there are few different kernels, and a table of them is read. Only on the CPU, where asking
    whether there is a tolerance waits for nobody.
    """
    if rows.tolerance.device.type != "cpu" or rows.tolerance.numpy().any():
        kernel = length_kernel(rows, bins)  # [R, N + 1]
        return kernel[:, 0], kernel @ bins.table("decode", kernel.device).T
    # in numpy, which starts an operator on a few numbers sooner than torch (np.clip would take ten times as long)
    last = bins.longest + 1
    left = np.minimum(np.maximum(rows.target.numpy() - rows.emitted.numpy(), 0), last)
    found = torch.from_numpy(kernel_table(bins.centres)[rows.mode.numpy() * (last + 1) + left])
    return found[:, 0], found[:, 1:]


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def kernel_table(centres: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[3 (N + 2), 1 + B] float32: of each mode past its bound, then for each m = 0..N, K(0) and the sums over the
    bins of a row without a tolerance: its line is mode (N + 2) + T - t, at least 0 and at most N + 1 of them."""
    decode = LengthBins.cached(centres).decode_matrix().double().T  # [N + 1, B]
    n = torch.arange(len(decode), dtype=torch.float64)
    m_is_zero = (n == 0).double()
    parts = {
        Mode.EQUAL_TO: (m_is_zero, decode),
        Mode.AT_MOST: (torch.ones_like(n), decode.cumsum(0)),
        Mode.AT_LEAST: (m_is_zero, decode.flip(0).cumsum(0).flip(0)),
    }
    over = torch.cat([torch.ones(1), torch.exp(-n / OVERRUN_TOKENS) @ decode])[None]
    rows = []
    for mode in Mode:
        at_zero, sums = parts[mode]
        inside = torch.cat([at_zero[:, None], sums], 1)
        rows += [inside[:1] if mode == Mode.AT_LEAST else over, inside]
    return torch.cat(rows).float().numpy()


def length_kernel(rows: GuidanceRows, bins: LengthBins) -> Tensor:
    """K(n), n = 0..N, of each row, [R, N + 1] float32, N the longest centre.

    equal_to: [n = m], or exp(-|n - m| / max(0.7, tolerance m)) with a tolerance; at_most: [n <= m]; at_least:
    [n >= m]. Past the bound (m < 0): exp(-n/3), and 1 for at_least. A target beyond the longest trained length counts
    as the longest.
    """
    n = torch.arange(bins.longest + 1, device=rows.target.device)[None, :]
    left = rows.left[:, None]
    m = left.clamp(0, bins.longest)
    width = (rows.tolerance[:, None] * m).clamp(min=MIN_TOLERANCE_TOKENS)
    distance = (n - m).abs().float()
    exact = torch.where(rows.tolerance[:, None] > 0, torch.exp(-distance / width), (distance == 0).float())
    at_most, at_least = (n <= m).float(), (n >= m).float()
    mode = rows.mode[:, None]
    kernel = torch.where(mode == Mode.AT_MOST, at_most, torch.where(mode == Mode.AT_LEAST, at_least, exact))
    past = torch.where(mode == Mode.AT_LEAST, torch.ones_like(kernel), torch.exp(-n.float() / OVERRUN_TOKENS))
    return torch.where(left < 0, past, kernel)


def hard(candidates: Candidates, scores: Scores, rows: GuidanceRows, lenvm: LenvmConfig) -> Tensor:
    """The paper's rule (section 3.2): one candidate is taken, whatever p says of it.

    equal_to: the smallest |V - V*| (in value space, where gamma decides how far tokens count); at_most: arg max V;
    at_least: arg min V while the bound is not reached, the base model afterwards. Ties: base probability, then the
    lower token id.
    """
    decay = decay_nats(lenvm.gamma)
    one_minus_u = torch.where(candidates.is_stop, 1.0, torch.sigmoid(-scores.z.float()))
    wanted = torch.exp(-rows.left.clamp(min=0).float() * decay)[:, None]
    mode = rows.mode[:, None]
    # one_minus_u = 1 + V, so larger is shorter
    nearest = (one_minus_u - wanted).abs()
    at_most, at_least = mode == int(Mode.AT_MOST), mode == int(Mode.AT_LEAST)
    cost = torch.where(at_most, -one_minus_u, torch.where(at_least, one_minus_u, nearest))
    cost = cost.masked_fill(~candidates.kept, torch.inf)
    choice = first_by(cost, -candidates.log_p, candidates.token_ids)
    picked = torch.full_like(candidates.log_p, -torch.inf).scatter_(-1, choice[:, None], 0.0)
    picked = torch.where(cost.isnan().any(-1, keepdim=True), torch.nan, picked)
    released = at_least & (rows.left <= 0)[:, None]
    return torch.where(released, candidates.log_p, picked)


def soft(candidates: Candidates, scores: Scores, rows: GuidanceRows, lenvm: LenvmConfig) -> Tensor:
    """Tilt so that the expected value meets the target: p' ~ p exp(beta u) with E_p'[u] = 1 - gamma^m.

    at_most and at_least tilt only if the base misses the bound in expectation. A target outside the candidates' range
    takes the nearest of them. beta by bisection in float64, which cannot diverge.
    """
    u = discounted_length(candidates, scores).double().masked_fill(~candidates.kept, 0.0)
    log_p = candidates.log_p.double()
    wanted = -torch.expm1(-rows.left.clamp(min=0).double() * decay_nats(lenvm.gamma))[:, None]

    def expectation(beta: Tensor) -> Tensor:
        return (torch.softmax(log_p + beta * u, -1) * u).sum(-1, keepdim=True)

    low = torch.full_like(wanted, -_TILT_LIMIT)
    high = torch.full_like(wanted, _TILT_LIMIT)
    for _ in range(_TILT_STEPS):
        middle = (low + high) / 2
        too_short = expectation(middle) < wanted
        low, high = torch.where(too_short, middle, low), torch.where(too_short, high, middle)
    beta = (low + high) / 2
    base = expectation(torch.zeros_like(wanted))
    mode = rows.mode[:, None]
    satisfied = (mode == int(Mode.AT_MOST)) & (base <= wanted) | (mode == int(Mode.AT_LEAST)) & (base >= wanted)
    beta = torch.where(satisfied, 0.0, beta)
    return torch.log_softmax(log_p + beta * u, -1).float()


def exponential_tilt(candidates: Candidates, scores: Scores, rows: GuidanceRows, lenvm: LenvmConfig) -> Tensor:
    """Exponential tilting (Eq. 11-12, section 3.3): p'(x) ~ p(x) exp(beta u(x)); beta < 0 is shorter."""
    return candidates.log_p + rows.bias[:, None] * discounted_length(candidates, scores)


def discounted_length(candidates: Candidates, scores: Scores) -> Tensor:
    """u = sigmoid(z) = 1 - gamma^n_hat, [R, K] float32; 0 for a stop token."""
    return torch.sigmoid(scores.z.float()).masked_fill(candidates.is_stop, 0.0)


def first_by(*keys: Tensor) -> Tensor:
    """[R] slot of the lexicographically smallest (key0, key1, ...) in each row."""
    alive = torch.ones_like(keys[0], dtype=torch.bool)
    for key in keys:
        values = key.double().masked_fill(~alive, torch.inf)
        alive = alive & (values == values.amin(-1, keepdim=True))
    return alive.int().argmax(-1)


Rule = Callable[[Candidates, Scores, GuidanceRows, LenvmConfig], Tensor]
RULES: dict[Control, Rule] = {
    Control.POSTERIOR: posterior,
    Control.HARD: hard,
    Control.SOFT: soft,
    Control.BIAS: exponential_tilt,
}
"""Every rule, by what the request calls it: a function of (log p, scores, row parameters)."""
