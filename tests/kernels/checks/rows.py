"""Mixed batches for `tilt_sample`, and what each row must come to: the rules once more, a row at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lenvm.bins import LengthBins
from lenvm.candidates import Candidates
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Mode, Scores
from lenvm.sampler import draw
from lenvm_kernels import Status, TiltSample
from tests.core.guidance_oracle import bin_pmf

MODELS = [
    LenvmConfig(gamma=gamma, bins=LengthBins.for_max_length(longest).centres)
    for gamma, longest in ((0.9, 40), (0.981, 80), (0.997, 400), (0.9999, 1500))
]


@dataclass
class Batch:
    """The arguments of `tilt_sample`."""

    candidates: Candidates
    scores: Scores
    guidance: GuidanceRows
    lenvm: LenvmConfig
    seed: Tensor
    greedy: Tensor

    def select(self, index: Tensor) -> Batch:
        """The rows of an index."""
        return Batch(
            Candidates(*(getattr(self.candidates, f.name)[index] for f in fields(Candidates))),
            Scores(self.scores.z[index], None if self.scores.length_log_q is None else self.scores.length_log_q[index]),
            self.guidance.select(index),
            self.lenvm,
            self.seed[index],
            self.greedy[index],
        )

    def reorder(self, slots: Tensor) -> Batch:
        """Candidates of each row in another order, [R, K]."""
        q = self.scores.length_log_q
        return replace(
            self,
            candidates=Candidates(*(getattr(self.candidates, f.name).gather(1, slots) for f in fields(Candidates))),
            scores=Scores(
                self.scores.z.gather(1, slots),
                None if q is None else q.gather(1, slots[..., None].expand(-1, -1, q.shape[-1])),
            ),
        )

    def run(self, function: Callable[..., TiltSample], **extra: object) -> TiltSample:
        return function(self.candidates, self.scores, self.guidance, self.lenvm, self.seed, self.greedy, **extra)


def mixed(lenvm: LenvmConfig, count: int, slots: int, seed: int) -> Batch:
    """Every control and mode; ties, saturated values, stop tokens here and there, empty slots, rows past the bound."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(0, len(values), (count,), generator=g)]

    log_p = torch.randn(count, slots, generator=g) * 2
    z_kinds = torch.stack(
        [
            torch.randn(count, slots, generator=g) * 2,
            torch.randn(count, slots, generator=g) * 0.01 + 5,
            torch.randn(count, slots, generator=g) * 30,
            (torch.randn(count, slots, generator=g) * 2).round(),
            torch.randn(count, slots, generator=g) * 1e-3 - 6,
        ]
    )
    z = z_kinds[torch.randint(0, 5, (count,), generator=g), torch.arange(count)]
    rounded = torch.rand(count, generator=g) < 0.3  # ties of p as well
    log_p[rounded] = log_p[rounded].round()
    kept_count = pick(1, 2, slots // 2, slots, slots).clamp(min=1)
    log_p[torch.arange(slots) >= kept_count[:, None]] = -math.inf
    log_p = log_p.log_softmax(-1)
    stop = (torch.arange(slots) == pick(-1, -1, 0, 1, slots - 1)[:, None]) & (log_p > -math.inf)
    log_q = (torch.randn(count, slots, len(lenvm.bins), generator=g) * pick(0.5, 3, 20)[:, None, None]).log_softmax(-1)
    unread = stop | (log_p == -math.inf)
    z[unread], log_q[unread] = math.nan, math.nan
    mode = pick(*map(int, Mode)).long()
    exact = mode == Mode.EQUAL_TO
    target = pick(1, 2, 5, 20, 90, 2000).long()
    return Batch(
        Candidates(torch.rand(count, 151_936, generator=g).argsort(-1)[:, :slots].clone(), log_p, stop)
        if count * slots < 64
        else Candidates(torch.stack([torch.randperm(9000, generator=g)[:slots] for _ in range(count)]), log_p, stop),
        Scores(z, log_q),
        GuidanceRows(
            mode=mode,
            control=pick(*map(int, Control)).long(),
            target=target,
            emitted=(torch.rand(count, generator=g) * (target + 4)).long(),
            sharpness=pick(0.5, 1, 2, 4),
            tolerance=torch.where(exact, pick(0, 0, 0.05, 0.5, 0.95), torch.tensor(0.0)),
            strict=torch.zeros(count, dtype=torch.bool),
            bias=pick(-1e4, -50, -3, 0, 2, 40, 1e6),
        ),
        lenvm,
        torch.randint(-(2**62), 2**62, (count,), generator=g),
        torch.rand(count, generator=g) < 0.2,
    )


@dataclass
class Truth:
    """What a row must come to: a distribution, or (hard rule) the cost of each slot, of which the least is taken."""

    p: Tensor | None
    cost: Tensor | None = None
    status: int = 0


def truth(batch: Batch, row: int, pmf: Tensor) -> Truth:
    """Row `row` in float64; `pmf` [B, N + 1] P(n | bin)."""
    c, g = batch.candidates, batch.guidance
    control, mode = Control(int(g.control[row])), Mode(int(g.mode[row]))
    log_p = c.log_p[row].double()
    kept = log_p > -math.inf
    log_p = torch.where(kept, log_p, -math.inf)
    stop = c.is_stop[row]
    base = log_p.softmax(-1)
    if not kept.any():
        return Truth(None, status=Status.EMPTY)
    left = int(g.target[row] - g.emitted[row] - 1)
    if control == Control.NONE:
        return Truth(base)
    scored = kept & ~stop
    if control == Control.POSTERIOR:
        assert batch.scores.length_log_q is not None
        log_q = batch.scores.length_log_q[row].double()
        if log_q[scored].isnan().any() or (log_q[scored] == math.inf).any():
            return Truth(base, status=Status.BAD_SCORES)
        n = torch.arange(pmf.shape[1], dtype=torch.float64)
        m = min(left, pmf.shape[1] - 1)
        tolerance = float(g.tolerance[row])
        if left < 0:
            kernel = torch.ones_like(n) if mode == Mode.AT_LEAST else torch.exp(-n / 3)
        elif mode == Mode.AT_MOST:
            kernel = (n <= m).double()
        elif mode == Mode.AT_LEAST:
            kernel = (n >= m).double()
        elif tolerance > 0:
            kernel = torch.exp(-(n - m).abs() / max(0.7, tolerance * m))
        else:
            kernel = (n == m).double()
        weight = torch.where(scored, log_q.softmax(-1).nan_to_num() @ (pmf @ kernel), 0.0)
        weight = torch.where(stop & kept, kernel[0], weight)
        if weight.max() <= 1e-30:
            return Truth(base, status=Status.VANISHED)
        return Truth((log_p + float(g.sharpness[row]) * (weight + 1e-30).log()).softmax(-1))
    z = batch.scores.z[row].double()
    if z[scored].isnan().any():
        return Truth(base, status=Status.BAD_SCORES)
    u = torch.where(scored, torch.sigmoid(z), 0.0)
    wanted = 1 - batch.lenvm.gamma ** max(left, 0)
    if control == Control.BIAS:
        return Truth((log_p + float(g.bias[row]) * u).softmax(-1))
    if control == Control.HARD:
        if mode == Mode.AT_LEAST and left <= 0:
            return Truth(base)
        cost = {Mode.AT_MOST: u, Mode.AT_LEAST: -u, Mode.EQUAL_TO: (u - wanted).abs()}[mode]
        return Truth(None, torch.where(kept, cost, math.inf))

    def mean(beta: float) -> float:
        return float(((log_p + beta * u).softmax(-1) * u).sum())

    low, high = -1e6, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < wanted else (low, middle)
    if (mode == Mode.AT_MOST and mean(0) <= wanted) or (mode == Mode.AT_LEAST and mean(0) >= wanted):
        low = high = 0.0
    return Truth((log_p + (low + high) / 2 * u).softmax(-1))


def pmf_of(lenvm: LenvmConfig) -> Tensor:
    """[B, N + 1] float64 P(n | bin), from the definition of the bins alone."""
    return torch.tensor(bin_pmf(lenvm.length_bins), dtype=torch.float64)


def problems(batch: Batch, got: TiltSample, truths: list[Truth]) -> list[str]:
    """What is wrong with a result; empty if nothing is."""
    found = []
    c, g = batch.candidates, batch.guidance
    assert got.status is not None and got.kl is not None and got.value is not None and got.expected_value is not None
    for r, expected in enumerate(truths):
        what = f"row {r} ({Control(int(g.control[r])).name}, {Mode(int(g.mode[r])).name})"
        if int(got.status[r]) != expected.status:
            found.append(f"{what}: status {int(got.status[r])}, not {expected.status}")
            continue
        untouched = g.control[r] == Control.NONE or expected.status
        if untouched and not torch.equal(got.log_p[r].view(torch.int32), c.log_p[r].view(torch.int32)):
            found.append(f"{what}: bits of an unsteered row changed")
        if expected.status == Status.EMPTY:
            continue
        p = got.log_p[r].double().nan_to_num(nan=-math.inf).exp()
        if expected.cost is not None:
            taken = int(p.argmax())
            if p[taken] != 1 or p.sum() != 1:
                found.append(f"{what}: not one candidate: {p.tolist()}")
            elif expected.cost[taken] - expected.cost.min() > 1e-7:
                found.append(f"{what}: slot {taken} costs {expected.cost[taken]}, the best {expected.cost.min()}")
        else:
            assert expected.p is not None
            sharp = float(g.sharpness[r]) if g.control[r] == Control.POSTERIOR else 0.0
            distance = 0.5 * (p - expected.p).abs().sum().item()
            if not distance <= 1e-6 + 2e-6 * sharp:
                found.append(f"{what}: total variation {distance}")
        kept = c.log_p[r] > -math.inf
        base = c.log_p[r].double().nan_to_num(nan=-math.inf).log_softmax(-1)
        kl = torch.where(p > 0, p * (p.log() - base), 0.0).sum().item()
        value = -torch.sigmoid(batch.scores.z[r].double()).masked_fill(c.is_stop[r] | ~kept, 0.0)
        mean = torch.where(p > 0, p * value, 0.0).sum().item()
        if abs(float(got.kl[r]) - kl) > 1e-5 + 1e-5 * abs(kl):
            found.append(f"{what}: KL {float(got.kl[r])}, not {kl}")
        if not math.isnan(mean) and abs(float(got.expected_value[r]) - mean) > 1e-5:
            found.append(f"{what}: expected value {float(got.expected_value[r])}, not {mean}")
        if not math.isnan(mean) and abs(float(got.value[r] - value[got.slot[r]])) > 1e-6:
            found.append(f"{what}: value {float(got.value[r])}, not {float(value[got.slot[r]])}")
    # the draw, from the log p' that came back and the sampler of the core
    clean = got.log_p.nan_to_num(nan=-math.inf)
    slot = draw(clean, c.token_ids, batch.seed, g.emitted, batch.greedy)
    for r in (slot != got.slot).nonzero().flatten().tolist():
        found.append(f"row {r}: drew slot {int(got.slot[r])}, the sampler draws {int(slot[r])}")
    if not torch.equal(c.token_ids.gather(1, got.slot[:, None])[:, 0], got.token_id):
        found.append("slot and token id disagree")
    return found
