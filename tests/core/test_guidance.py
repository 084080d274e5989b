"""Guidance rules against a float64 oracle written row by row, and their properties."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenvm.bins import LengthBins
from lenvm.candidates import Candidates
from lenvm.definitions import logit_from_length
from lenvm.format import LenvmConfig
from lenvm.guidance import (
    Control,
    GuidanceRows,
    Mode,
    Scores,
    guide,
    kernel_per_bin,
    length_kernel,
    predicted_lengths,
    strict_bounds,
)
from lenvm.request import CONTROLS, MODES
from tests.core import guidance_oracle as oracle

GAMMA = 0.981
BINS = LengthBins.for_max_length(80)
PMF = oracle.bin_pmf(BINS)
LENVM = LenvmConfig(gamma=GAMMA, bins=BINS.centres)
VALUE_ONLY = LenvmConfig(gamma=GAMMA, heads=("value",))
SLOTS = 7


def random_row(rng: random.Random) -> tuple[list[oracle.Candidate], oracle.Ask]:
    count = rng.randint(1, SLOTS)
    logits = [rng.gauss(0, 2) for _ in range(count)]
    p = oracle.normalise([math.exp(x) for x in logits])
    stop = rng.randrange(count) if rng.random() < 0.5 else -1
    candidates = []
    for i, token in enumerate(rng.sample(range(1000), count)):
        q = oracle.normalise([math.exp(rng.gauss(0, 3)) for _ in BINS.centres])
        candidates.append(oracle.Candidate(token, p[i], i == stop, rng.gauss(0, 4), q))
    mode = rng.choice(list(MODES))
    control = rng.choice([*CONTROLS, "bias"])
    target = rng.choice([1, 2, 5, 20, 70, 200])
    return candidates, oracle.Ask(
        mode,
        control,
        target,
        emitted=rng.randint(0, target + 4),
        sharpness=rng.choice([0.5, 1.0, 2.0, 4.0]),
        tolerance=rng.choice([0.0, 0.0, 0.05, 0.5]) if mode == "equal_to" else 0.0,
        bias=rng.choice([-50.0, -3.0, 0.0, 2.0, 40.0]),
    )


def tensors(rows: list[tuple[list[oracle.Candidate], oracle.Ask]]) -> tuple[Candidates, Scores, GuidanceRows]:
    n = len(rows)
    ids = torch.zeros(n, SLOTS, dtype=torch.int64)
    log_p = torch.full((n, SLOTS), -torch.inf, dtype=torch.float64)
    is_stop = torch.zeros(n, SLOTS, dtype=torch.bool)
    z = torch.full((n, SLOTS), torch.nan)
    log_q = torch.full((n, SLOTS, len(BINS)), torch.nan)
    for r, (candidates, _) in enumerate(rows):
        for k, c in enumerate(candidates):
            ids[r, k], log_p[r, k], is_stop[r, k] = c.token_id, math.log(c.p), c.stop
            if not c.stop:  # scores of stop tokens and of empty slots must never be read
                z[r, k], log_q[r, k] = c.z, torch.tensor(c.q).log()
    asks = [ask for _, ask in rows]
    controls = {**CONTROLS, "bias": Control.BIAS}
    return (
        Candidates(ids, log_p.float(), is_stop),
        Scores(z, log_q),
        GuidanceRows(
            mode=torch.tensor([MODES[a.mode] for a in asks]),
            control=torch.tensor([controls[a.control] for a in asks]),
            target=torch.tensor([a.target for a in asks]),
            emitted=torch.tensor([a.emitted for a in asks]),
            sharpness=torch.tensor([a.sharpness for a in asks]),
            tolerance=torch.tensor([a.tolerance for a in asks]),
            strict=torch.zeros(n, dtype=torch.bool),
            bias=torch.tensor([a.bias for a in asks]),
        ),
    )


def expected_row(candidates: list[oracle.Candidate], ask: oracle.Ask) -> list[float]:
    match ask.control:
        case "posterior":
            return oracle.posterior(candidates, ask, BINS, PMF)
        case "hard":
            return oracle.hard(candidates, ask, GAMMA)
        case "soft":
            return oracle.soft(candidates, ask, GAMMA)
        case _:
            return oracle.bias(candidates, ask)


def test_mixed_rows_against_the_oracle() -> None:
    """One batch of 600 rows that mixes modes, controls, sizes, stop tokens and rows past their bound."""
    rng = random.Random(0)
    rows = [random_row(rng) for _ in range(600)]
    got = guide(*tensors(rows), LENVM).double().exp()
    for r, (candidates, ask) in enumerate(rows):
        expected = torch.zeros(SLOTS, dtype=torch.float64)
        expected[: len(candidates)] = torch.tensor(expected_row(candidates, ask), dtype=torch.float64)
        distance = 0.5 * (got[r] - expected).abs().sum().item()
        assert distance < 2e-5, (ask, distance)


def test_rules_not_present_are_not_needed() -> None:
    rng = random.Random(1)
    rows = [(c, a) for c, a in (random_row(rng) for _ in range(80)) if a.control == "posterior"]
    args = tensors(rows)
    assert torch.equal(guide(*args, LENVM), guide(*args, LENVM, present=[Control.POSTERIOR]))


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_rows_do_not_see_each_other(seed: int) -> None:
    rng = random.Random(seed)
    rows = [random_row(rng) for _ in range(6)]
    together = guide(*tensors(rows), LENVM)
    order = list(range(6))
    rng.shuffle(order)
    shuffled = guide(*tensors([rows[i] for i in order]), LENVM)
    for new, old in enumerate(order):
        assert torch.allclose(shuffled[new].exp(), together[old].exp(), atol=1e-6)
        alone = guide(*tensors([rows[old]]), LENVM)[0]
        assert torch.allclose(alone.exp(), together[old].exp(), atol=1e-6)


def uniform_rows(control: Control, mode: Mode, count: int = 1, **values: float) -> GuidanceRows:
    fill = {"target": 10, "emitted": 0, "sharpness": 1.0, "tolerance": 0.0, "strict": False, "bias": 0.0, **values}
    dtypes = {"target": torch.int64, "emitted": torch.int64, "strict": torch.bool}
    tensors_ = {
        name: torch.full((count,), value, dtype=dtypes.get(name, torch.float32)) for name, value in fill.items()
    }
    return GuidanceRows(mode=torch.full((count,), int(mode)), control=torch.full((count,), int(control)), **tensors_)


def two_candidates(short: float, long: float) -> tuple[Candidates, Scores]:
    """Two equally likely candidates, after which `short` and `long` tokens are predicted."""
    z = logit_from_length(torch.tensor([[short, long]]), GAMMA)
    log_q = (BINS.targets(torch.tensor([[short, long]])) * 0.98 + 0.02 / len(BINS)).log()
    return (
        Candidates(torch.tensor([[4, 9]]), torch.tensor([[0.5, 0.5]]).log(), torch.zeros(1, 2, dtype=torch.bool)),
        Scores(z, log_q),
    )


@pytest.mark.parametrize("lenvm", [LENVM, VALUE_ONLY], ids=["distribution", "log-normal"])
def test_negative_bias_is_shorter(lenvm: LenvmConfig) -> None:
    """The sign that the paper's Eq. 12 has the wrong way round."""
    candidates, scores = two_candidates(5, 60)
    scores = Scores(scores.z, scores.length_log_q if lenvm.has_length_head else None)
    shorter = guide(candidates, scores, uniform_rows(Control.BIAS, Mode.EQUAL_TO, bias=-4.0), lenvm)[0]
    longer = guide(candidates, scores, uniform_rows(Control.BIAS, Mode.EQUAL_TO, bias=4.0), lenvm)[0]
    assert shorter[0] > math.log(0.8) and longer[1] > math.log(0.8)


def test_zero_bias_and_unsteered_rows_are_the_base() -> None:
    candidates, scores = two_candidates(5, 60)
    for rows in (uniform_rows(Control.BIAS, Mode.EQUAL_TO), uniform_rows(Control.NONE, Mode.EQUAL_TO)):
        assert torch.allclose(guide(candidates, scores, rows, LENVM), candidates.log_p)


@pytest.mark.parametrize("control", [Control.POSTERIOR, Control.HARD, Control.SOFT])
@pytest.mark.parametrize("lenvm", [LENVM, VALUE_ONLY], ids=["distribution", "log-normal"])
def test_every_control_prefers_what_fits(control: Control, lenvm: LenvmConfig) -> None:
    """Value-only checkpoints included: their distribution is the log-normal around the inverted value."""
    candidates, scores = two_candidates(5, 60)
    if lenvm is VALUE_ONLY:
        scores = Scores(scores.z)
    for mode, target, wanted in (
        (Mode.EQUAL_TO, 6, 0),
        (Mode.EQUAL_TO, 61, 1),
        (Mode.AT_MOST, 8, 0),
        (Mode.AT_LEAST, 50, 1),
    ):
        log_p = guide(candidates, scores, uniform_rows(control, mode, target=target), lenvm)[0]
        assert log_p[wanted] > log_p[1 - wanted], (mode, target)


@settings(max_examples=50)
@given(st.integers(0, 10**6))
def test_expected_length_grows_with_bias(seed: int) -> None:
    candidates, scores, _ = tensors([random_row(random.Random(seed))])
    lengths = predicted_lengths(candidates, Scores(scores.z), VALUE_ONLY)
    u = torch.sigmoid(scores.z).masked_fill(candidates.is_stop, 0.0)
    means = []
    for bias in (-20.0, -2.0, 0.0, 3.0, 30.0):
        p = guide(candidates, scores, uniform_rows(Control.BIAS, Mode.EQUAL_TO, bias=bias), LENVM).exp()
        means.append((p * u.nan_to_num()).sum().item())
    assert all(b >= a - 1e-6 for a, b in pairwise(means))
    assert (lengths.masked_select(candidates.is_stop) == 0).all()


def test_all_weights_vanishing_keeps_the_base() -> None:
    """Target 3 with only a stop token and a long tail that puts no mass near: p stays."""
    candidates, _ = two_candidates(5, 60)
    log_q = torch.full((1, 2, len(BINS)), -torch.inf)
    log_q[..., -1] = 0.0
    out = guide(
        candidates, Scores(torch.zeros(1, 2), log_q), uniform_rows(Control.POSTERIOR, Mode.AT_MOST, target=5), LENVM
    )
    assert torch.allclose(out, candidates.log_p)


@pytest.mark.parametrize("control", list(Control))
def test_nan_scores_fall_back_to_the_base(control: Control) -> None:
    candidates, _ = two_candidates(5, 60)
    scores = Scores(torch.full((1, 2), torch.nan), torch.full((1, 2, len(BINS)), torch.nan))
    rows = uniform_rows(control, Mode.EQUAL_TO, bias=1.0)
    assert torch.allclose(guide(candidates, scores, rows, LENVM), candidates.log_p)


def test_hard_ties_go_to_probability_then_id() -> None:
    candidates = Candidates(
        torch.tensor([[7, 3, 5]]), torch.tensor([[0.4, 0.3, 0.3]]).log(), torch.zeros(1, 3, dtype=torch.bool)
    )
    equal = Scores(torch.zeros(1, 3))
    assert guide(candidates, equal, uniform_rows(Control.HARD, Mode.AT_MOST), LENVM)[0].argmax() == 0
    same_p = Candidates(candidates.token_ids, torch.full((1, 3), 1 / 3).log(), candidates.is_stop)
    assert guide(same_p, equal, uniform_rows(Control.HARD, Mode.AT_MOST), LENVM)[0].argmax() == 1


def test_far_targets_count_as_the_longest() -> None:
    rows = uniform_rows(Control.POSTERIOR, Mode.EQUAL_TO, target=5000)
    assert length_kernel(rows, BINS)[0].nonzero().flatten().tolist() == [BINS.longest]


def test_strict_bounds() -> None:
    """Target 4: stops are banned at t = 0..2 and forced from t = 3 on."""
    for mode, banned, forced in (
        (Mode.EQUAL_TO, [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]),
        (Mode.AT_MOST, [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]),
        (Mode.AT_LEAST, [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]),
    ):
        for t in range(5):
            ban, force = strict_bounds(uniform_rows(Control.POSTERIOR, mode, target=4, emitted=t, strict=True))
            assert [ban.item(), force.item()] == [bool(banned[t]), bool(forced[t])]
    for control in (Control.NONE, Control.BIAS):
        ban, force = strict_bounds(uniform_rows(control, Mode.EQUAL_TO, target=4, emitted=9, strict=True))
        assert not ban.item() and not force.item()


def test_select_rows() -> None:
    rows = uniform_rows(Control.SOFT, Mode.AT_MOST, count=3)
    assert rows.select(torch.tensor([True, False, True])).target.shape == (2,)


def test_the_table_of_kernels_per_bin_is_the_kernel_summed_over_the_bins() -> None:
    left = torch.tensor([-30, -1, 0, 1, 2, 11, 12, 13, 20, 79, 80, 81, 5000]).repeat(3)
    mode = torch.arange(3).repeat_interleave(13)
    zero = torch.zeros(39)
    rows = GuidanceRows(
        mode=mode, control=mode * 0 + int(Control.POSTERIOR), target=left + 1, emitted=left * 0, sharpness=zero + 1,
        tolerance=zero, strict=zero > 0, bias=zero,
    )  # fmt: skip
    kernel = length_kernel(rows, BINS)
    at_zero, per_bin = kernel_per_bin(rows, BINS)
    assert torch.equal(at_zero, kernel[:, 0])
    want = kernel.double() @ BINS.decode_matrix().double().T
    torch.testing.assert_close(per_bin.double(), want, rtol=1e-5, atol=1e-7)
