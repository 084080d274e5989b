"""Definitions against their equations in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lenvm.definitions import (
    decay_nats,
    discounted_return,
    gamma_from_lengths,
    length_from_logit,
    logit_from_length,
    target_nats,
    td_residual,
    value_from_logit,
)

gammas = st.floats(0.9, 0.9999)
lengths = st.integers(1, 4000)


@given(gammas, st.integers(1, 200))
def test_return_is_the_discounted_sum_of_rewards(gamma: float, length: int) -> None:
    """Eq. 2 as a sum of Eq. 1's rewards."""
    for t in (0, length // 2, length - 1):
        total = sum(gamma**i * -(1 - gamma) for i in range(length - t))
        closed = discounted_return(torch.tensor(length - t, dtype=torch.float64), gamma).item()
        assert closed == pytest.approx(total, rel=1e-9)


def test_return_of_the_end_is_zero() -> None:
    assert discounted_return(torch.tensor([0, 1]), 0.99).tolist() == pytest.approx([0.0, -0.01])


@given(gammas, lengths)
def test_length_and_logit_invert_each_other(gamma: float, n: int) -> None:
    z = logit_from_length(torch.tensor(float(n), dtype=torch.float64), gamma)
    assert length_from_logit(z, gamma).item() == pytest.approx(n, rel=1e-9)
    # and Eq. 5 itself: l = ln(1 + V) / ln gamma, where it still has digits
    value = value_from_logit(z).item()
    if value > -0.999:
        assert math.log1p(value) / math.log(gamma) == pytest.approx(n, rel=1e-6)


def test_length_has_no_clamp_at_either_end() -> None:
    far = length_from_logit(torch.tensor([-40.0, 300.0]), 0.997)
    assert far[0] > 0
    assert far[1].item() == pytest.approx(300.0 / decay_nats(0.997), rel=1e-6)


def test_integer_lengths_are_accepted() -> None:
    n = torch.tensor([1, 7])
    assert discounted_return(n, 0.9).dtype == torch.float32
    assert length_from_logit(logit_from_length(n, 0.9), 0.9).tolist() == pytest.approx([1.0, 7.0], rel=1e-5)
    assert target_nats(torch.tensor(2.0), 0.5).item() == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_gamma_out_of_range_says_so(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be strictly between 0 and 1"):
        decay_nats(gamma)


def test_auto_gamma_leaves_one_percent_at_the_99th_percentile() -> None:
    gamma = gamma_from_lengths(range(1, 1001))
    assert gamma**990.01 == pytest.approx(0.01, rel=1e-6)
    with pytest.raises(ValueError, match="empty sample"):
        gamma_from_lengths([])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        gamma_from_lengths([3, 0])


@given(gammas, st.integers(1, 60))
def test_td_residual_of_the_true_returns_is_zero(gamma: float, length: int) -> None:
    n = torch.arange(length, 0, -1, dtype=torch.float64)
    assert td_residual(discounted_return(n, gamma), gamma).abs().max().item() < 1e-12


def test_td_residual_sign() -> None:
    """A token after which the expected remainder jumps from 5 to 50 tokens lengthens: negative."""
    values = discounted_return(torch.tensor([5.0, 50.0]), 0.99)
    assert td_residual(values, 0.99)[0] < 0
