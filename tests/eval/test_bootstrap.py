"""Intervals that resample prompts."""

from __future__ import annotations

import numpy as np
import pytest

from lenvm.evaluation.bootstrap import Clustered, difference_interval, mean_interval, ratio_interval, share_interval


def _clusters(prompts: int, each: int, between: float, within: float, seed: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, between, size=(prompts, 1)) + rng.normal(0, within, size=(prompts, each))
    return values.ravel(), [f"p{i}" for i in range(prompts) for _ in range(each)]


def test_interval_has_the_width_of_the_cluster_means():
    values, prompts = _clusters(100, 20, between=1.0, within=0.1, seed=1)
    found = mean_interval(values, prompts)
    assert found is not None
    half = 1.96 * values.reshape(100, 20).mean(1).std() / 10
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)  # not sqrt(20) times narrower
    assert (found.n, found.prompts) == (2000, 100)


def test_it_covers_the_truth_about_as_often_as_it_says():
    inside = 0
    for seed in range(100):
        found = mean_interval(*_clusters(40, 5, 1.0, 1.0, seed), seed=seed)
        assert found is not None
        inside += found.low <= 0.0 <= found.high
    assert inside >= 88


def test_difference_is_paired_by_prompt():
    values, prompts = _clusters(60, 4, between=5.0, within=0.1, seed=2)
    shifted = Clustered(values + 1.0, prompts)
    found = difference_interval(shifted, Clustered(values, prompts))
    assert found is not None
    assert found.value == pytest.approx(1.0)
    assert found.high - found.low < 1e-9  # the prompts' own spread cancels


def test_ratio():
    found = ratio_interval(Clustered([1.0, 2.0, 3.0], list("abc")), Clustered([2.0, 4.0, 6.0], list("abc")))
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert ratio_interval(Clustered([1.0], ["a"]), Clustered([0.0], ["a"])) is None


def test_all_hits_do_not_give_a_width_of_zero():
    found = share_interval([1.0] * 200, [f"p{i // 2}" for i in range(200)])
    assert found is not None
    assert found.high == 1.0
    assert found.low == pytest.approx(0.025 ** (1 / 100))
    none = share_interval([0.0] * 50, [f"p{i}" for i in range(50)])
    assert none is not None
    assert (none.low, none.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 50)))


def test_empty_and_mismatched_input():
    assert mean_interval([], []) is None
    assert difference_interval(Clustered([], []), Clustered([1.0], ["a"])) is None
    with pytest.raises(ValueError, match="got 2 values, 1 prompts"):
        Clustered([1.0, 2.0], ["a"])
