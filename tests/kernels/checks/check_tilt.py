"""`tilt_sample` against float64, against the core, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch

from lenvm.bins import LengthBins
from lenvm.candidates import Candidates
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Mode, Scores, guide, length_kernel
from lenvm.sampler import draw
from lenvm_kernels import Status, reference, tilt_sample
from tests.kernels.checks import quick, rows

assert quick


@pytest.mark.parametrize("number", range(4), ids=["gamma 0.9", "gamma 0.981", "gamma 0.997", "gamma 0.9999"])
def test_mixed_rows_against_float64_and_the_core(number: int) -> None:
    """Four models, 112 rows each."""
    lenvm = rows.MODELS[number]
    batch = rows.mixed(lenvm, 112, slots=(3, 9, 16, 17)[number], seed=number)
    got = batch.run(tilt_sample)
    pmf = rows.pmf_of(lenvm)
    assert not rows.problems(batch, got, [rows.truth(batch, r, pmf) for r in range(112)])
    want = batch.run(reference.tilt_sample, present=None, statistics=True, lengths=True)
    close = 0.5 * (got.log_p.exp() - want.log_p.exp()).abs().sum(-1) < 1e-5
    # the core has u in float32: where a bias multiplies its rounding, float64 is the judge, not the core
    assert close.sum() >= 100
    assert torch.equal(got.token_id[close], want.token_id[close])
    assert torch.allclose(got.length[close], want.length[close], rtol=1e-4, atol=1e-2)
    assert torch.allclose(got.kl[close], want.kl[close], rtol=1e-3, atol=2e-5)
    assert torch.equal(got.status, want.status)


def test_value_only_checkpoint_takes_the_log_normal_of_the_core() -> None:
    lenvm = LenvmConfig(gamma=0.98, heads=("value",))
    batch = rows.mixed(rows.MODELS[1], 40, slots=6, seed=9)
    batch.lenvm, batch.scores = lenvm, Scores(batch.scores.z)
    got = batch.run(tilt_sample)
    want = batch.run(reference.tilt_sample, present=None, statistics=True, lengths=True)
    close = 0.5 * (got.log_p.exp() - want.log_p.exp()).abs().sum(-1) < 1e-5
    assert close.sum() >= 35
    assert torch.equal(got.token_id[close], want.token_id[close])
    assert torch.allclose(got.length, want.length, rtol=1e-5, atol=1e-5)


def one(
    log_p: list[float], z: list[float], control: Control, mode: Mode = Mode.EQUAL_TO, **fields: float
) -> rows.Batch:
    """A batch of one row with token ids 10, 9, 8, ...; `stop` is the slot of a stop token."""
    count = len(log_p)
    lenvm = rows.MODELS[1]
    stop = torch.zeros(1, count, dtype=torch.bool)
    if "stop" in fields:
        stop[0, int(fields.pop("stop"))] = True
    given = {"target": 10, "emitted": 0, "sharpness": 1.0, "tolerance": 0.0, "bias": 0.0, **fields}
    whole = {"target", "emitted"}
    g = {k: torch.tensor([v], dtype=torch.int64 if k in whole else torch.float32) for k, v in given.items()}
    log_q = lenvm.length_bins.targets(torch.linspace(1, 60, count))[None].log()
    return rows.Batch(
        Candidates(torch.arange(10, 10 - count, -1)[None], torch.tensor([log_p]), stop),
        Scores(torch.tensor([z]), log_q),
        GuidanceRows(
            mode=torch.tensor([int(mode)]),
            control=torch.tensor([int(control)]),
            strict=torch.tensor([False]),
            **g,
        ),
        lenvm,
        torch.tensor([5]),
        torch.tensor([False]),
    )


STEERING = [Control.POSTERIOR, Control.HARD, Control.SOFT, Control.BIAS]
PMF = rows.pmf_of(rows.MODELS[1])
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("control", list(Control), ids=lambda c: c.name)
def test_edges(control: Control) -> None:
    half = math.log(0.5)
    cases = {
        "no candidate": one([-INF, -INF], [0.0, 0.0], control),
        "one candidate": one([0.0], [1.0], control, bias=3.0),
        "one candidate, a stop token": one([0.0], [NAN], control, stop=0),
        "only one slot kept": one([0.0, -INF, -INF], [1.0, NAN, INF], control),
        "infinite values": one([half, half], [INF, -INF], control, bias=2.0),
        "values beyond +-30": one([half, half], [90.0, -90.0], control, bias=-2.0),
        "NaN value": one([half, half], [NAN, 1.0], control, bias=2.0),
        "NaN value of a stop token": one([half, half], [NAN, 1.0], control, bias=2.0, stop=0),
        "NaN probability": one([NAN, 0.0], [0.0, 1.0], control),
        "equal in everything": one([half, half], [1.0, 1.0], control, bias=2.0),
        "past the bound": one([half, half], [3.0, 1.0], control, emitted=30),
        "far target": one([half, half], [3.0, 1.0], control, target=10**6),
    }
    for name, batch in cases.items():
        for mode in Mode:
            batch.guidance.mode.fill_(int(mode))
            found = rows.problems(batch, batch.run(tilt_sample), [rows.truth(batch, 0, PMF)])
            assert not found, (name, mode, found)


def test_bad_length_scores_keep_the_base() -> None:
    for wrong in (NAN, INF):
        batch = one([math.log(0.5)] * 2, [0.0, 0.0], Control.POSTERIOR)
        assert batch.scores.length_log_q is not None
        batch.scores.length_log_q[0, 1, 3] = wrong
        got = batch.run(tilt_sample)
        assert int(got.status[0]) == Status.BAD_SCORES
        assert torch.equal(got.log_p, batch.candidates.log_p)


def test_an_impossible_target_keeps_the_base_and_says_so() -> None:
    """All lengths of the model are far from the target: every weight is zero."""
    batch = one([math.log(0.25), math.log(0.75)], [0.0, 0.0], Control.POSTERIOR, target=31)
    got = batch.run(tilt_sample)
    assert int(got.status[0]) == Status.VANISHED
    assert torch.equal(got.log_p, batch.candidates.log_p)
    assert float(got.kl[0]) == 0.0


def test_hard_ties_go_to_the_base_probability_then_to_the_lower_id() -> None:
    level = math.log(1 / 3)
    for log_p, slot in (([level] * 3, 2), ([math.log(0.2), math.log(0.6), math.log(0.2)], 1)):
        got = one(log_p, [1.0, 1.0, 1.0], Control.HARD).run(tilt_sample)
        assert int(got.slot[0]) == slot


def test_greedy_ties_go_to_the_lower_id() -> None:
    batch = one([math.log(0.5)] * 2, [1.0, 1.0], Control.NONE)
    batch.greedy.fill_(True)
    assert int(batch.run(tilt_sample).token_id[0]) == 9


def test_closed_forms_of_the_length_kernels() -> None:
    """Every bin, many targets, modes and widths: a candidate whose whole mass is one bin has that bin's weight."""
    bins = LengthBins.for_max_length(500)
    lenvm = LenvmConfig(gamma=0.99, bins=bins.centres)
    count = len(bins)
    cases = [
        (mode, left, tolerance)
        for left in (-4, 0, 1, 7, 12, 13, 60, 333, 499, 500, 2000)
        for mode, tolerance in ((0, 0.0), (0, 0.02), (0, 0.4), (0, 0.99), (1, 0.0), (2, 0.0))
    ]
    r = len(cases)
    mode, left, tolerance = (torch.tensor(x) for x in zip(*cases, strict=True))
    guidance = GuidanceRows(
        mode=mode, control=torch.full((r,), int(Control.POSTERIOR)), target=left + 1, emitted=torch.zeros_like(left),
        sharpness=torch.ones(r), tolerance=tolerance, strict=torch.zeros(r, dtype=torch.bool), bias=torch.zeros(r),
    )  # fmt: skip
    one_hot = torch.full((count + 1, count), -INF)
    one_hot[:count].fill_diagonal_(0.0)
    one_hot[count] = -math.log(count)  # a candidate of any length, so that a row never vanishes
    log_p = torch.full((r, count + 1), -math.log(count + 1))
    candidates = Candidates(torch.arange(count + 1).expand(r, -1), log_p, torch.zeros(r, count + 1, dtype=torch.bool))
    scores = Scores(torch.zeros(r, count + 1), one_hot.expand(r, -1, -1).contiguous())
    got = tilt_sample(candidates, scores, guidance, lenvm, torch.zeros_like(left), torch.ones(r, dtype=torch.bool))
    kernel = length_kernel(guidance, bins).double() @ rows.pmf_of(lenvm).T
    weight = torch.cat([kernel, kernel.mean(-1, keepdim=True)], -1) + 1e-30
    want = weight / weight.sum(-1, keepdim=True)
    assert (0.5 * (got.log_p.double().exp() - want).abs().sum(-1)).max() < 5e-6
    large = want > 1e-25
    assert ((got.log_p.double() - want.log())[large]).abs().max() < 1e-4


def test_chi_square_of_the_draw() -> None:
    """300 draws of one tilted distribution, keyed by position alone."""
    batch = one([math.log(p) for p in (0.4, 0.3, 0.2, 0.1)], [0.0, 1.0, -1.0, 2.0], Control.BIAS, bias=1.0)
    many = batch.select(torch.zeros(300, dtype=torch.int64))
    many.guidance.emitted.copy_(torch.arange(300))
    many.scores = Scores(many.scores.z)
    got = many.run(tilt_sample, present=[Control.BIAS])
    p = rows.truth(batch, 0, PMF).p
    counts = torch.bincount(got.slot, minlength=4).double()
    assert ((counts - 300 * p) ** 2 / (300 * p)).sum() < 16.27  # 99.9 % point at 3 degrees of freedom; deterministic
    expected = draw(got.log_p, many.candidates.token_ids, many.seed, many.guidance.emitted, many.greedy)
    assert torch.equal(expected, got.slot)


def test_rules_agree_with_the_core_bit_for_bit_where_nothing_is_steered() -> None:
    batch = one([math.log(0.5)] * 2, [1.0, 2.0], Control.NONE)
    got = batch.run(tilt_sample)
    assert torch.equal(got.log_p, batch.candidates.log_p)
    assert torch.allclose(got.log_p, guide(batch.candidates, batch.scores, batch.guidance, batch.lenvm))
