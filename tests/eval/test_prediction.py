"""Eq. 13-15 and the noise floor against plain computations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lenvm.evaluation.prediction import (
    best_constant,
    coverage,
    leave_one_out_mean,
    relative_error,
    return_consistent_length,
    sampling_noise,
)


def test_return_consistent_length_is_equations_13_and_14():
    lengths, gamma = [3, 50, 200], 0.98
    mu = sum(1 - gamma**n for n in lengths) / 3
    assert float(return_consistent_length(lengths, gamma)) == pytest.approx(math.log(1 - mu) / math.log(gamma))


def test_it_underestimates_the_mean_unless_lengths_agree():
    assert float(return_consistent_length([10, 90], 0.98)) < 50
    assert float(return_consistent_length([40, 40], 0.98)) == pytest.approx(40)


def test_it_survives_lengths_whose_gamma_power_underflows():
    assert float(return_consistent_length([10**6, 10**6], 0.5)) == pytest.approx(10**6)


def test_relative_error_by_hand():
    error = relative_error([12, 8], [10, 10])
    assert error.tolist() == pytest.approx([0.2, -0.2])
    assert np.abs(error).mean() == pytest.approx(0.2)


@pytest.mark.parametrize("gamma", [None, 0.98])
def test_noise_floor_is_the_error_of_the_truth_itself(gamma):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.gamma(2.0, 20.0, size=(300, n))  # noqa: E731
    big = draw(200_00)[:1]
    truth = big.mean() if gamma is None else float(return_consistent_length(big[0], gamma))
    rows = draw(64)
    measured = rows.mean(-1) if gamma is None else return_consistent_length(rows, gamma)
    actual = np.abs(measured / truth - 1).mean()
    assert sampling_noise(list(rows), gamma).mean() == pytest.approx(actual, rel=0.1)


def test_baselines():
    assert leave_one_out_mean([10, 20, 60]).tolist() == pytest.approx([40, 35, 15])
    with pytest.raises(ValueError, match="at least 2 prompts, got 1"):
        leave_one_out_mean([10])
    truth = np.array([10.0, 11, 12, 100, 300])
    best = best_constant(truth)
    grid = [np.abs(relative_error(np.full(5, c), truth)).mean() for c in range(1, 400)]
    assert np.abs(relative_error(np.full(5, best), truth)).mean() == pytest.approx(min(grid))


def test_coverage_counts_lengths_at_or_below_the_quantile():
    assert coverage([np.array([1, 2, 3, 4]), np.array([5, 5])], [2, 4]).tolist() == [0.5, 0.0]
