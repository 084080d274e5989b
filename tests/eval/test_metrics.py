"""Scores against hand computations from the paper's Eq. 17 and 18."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm.evaluation.metrics import (
    MODES,
    accuracy_at_length,
    hard_cut,
    hard_cut_curve,
    kept,
    length_deviation,
    length_score,
    repetition,
)


def test_deviation_is_signed_and_relative_to_the_target():
    assert length_deviation([110, 90, 100], 100).tolist() == pytest.approx([0.1, -0.1, 0.0])


@pytest.mark.parametrize(
    ("mode", "length", "expected"),
    [
        ("equal_to", 100, 100.0),
        ("equal_to", 90, 100 * math.exp(-0.5)),  # k1 = 5, LD = -0.1
        ("equal_to", 110, 100 * math.exp(-0.2)),  # k2 = 2, LD = 0.1
        ("equal_to", 200, 100 * math.exp(-2.0)),
        ("at_most", 10, 100.0),
        ("at_most", 100, 100.0),
        ("at_most", 150, 100 * math.exp(-1.0)),
        ("at_least", 500, 100.0),
        ("at_least", 100, 100.0),
        ("at_least", 80, 100 * math.exp(-1.0)),
    ],
)
def test_length_score_by_hand(mode, length, expected):
    assert float(length_score(length, 100, mode)) == pytest.approx(expected)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(MODES))
def test_score_is_100_exactly_where_the_constraint_is_kept(length, target, mode):
    score = float(length_score(length, target, mode))
    assert 0 <= score <= 100
    assert (score == 100) == bool(kept(length, target, mode))


def test_a_cut_answer_keeps_only_a_bound_from_below():
    assert not kept(64, 64, "equal_to", ended=False)
    assert not kept(64, 80, "at_most", ended=False)
    assert kept(64, 60, "at_least", ended=False)
    assert kept([5, 5], 5, "equal_to", ended=[True, False]).tolist() == [True, False]


def test_huge_overshoot_does_not_overflow():
    with np.errstate(all="raise"):
        assert float(length_score(1, 10**6)) == pytest.approx(100 * math.exp(-5), rel=1e-4)
        assert 0 <= float(length_score(10**3, 10)) < 1e-80


def test_bad_input_says_what_is_allowed():
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        length_deviation(5, 0)
    with pytest.raises(ValueError, match="'about'; allowed are equal_to, at_most, at_least"):
        length_score(5, 5, "about")  # type: ignore[arg-type]


def test_repetition_counts_repeated_four_grams():
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2, 3, 4] * 2) == pytest.approx(1 - 4 / 5)  # grams 1234 2341 3412 4123 1234
    assert repetition([7] * 10) == pytest.approx(1 - 1 / 7)


def test_hard_cut_truncates_length_and_marks_longer_answers_wrong():
    lengths, right = hard_cut([10, 20, 30], [1, 1, 0], 20)
    assert lengths.tolist() == [10, 20, 20]
    assert right.tolist() == [1, 1, 0]
    lengths, right = hard_cut([10, 20, 30], [1, 1, 1], 19)
    assert (lengths.mean(), right.mean()) == (pytest.approx(48 / 3), pytest.approx(1 / 3))


def test_hard_cut_curve_ends_at_the_base_and_is_read_between_points():
    lengths, right = np.array([10, 20, 30, 40]), np.array([1, 0, 1, 1])
    budgets, x, y = hard_cut_curve(lengths, right)
    assert budgets.tolist() == [10, 20, 30, 40]
    assert (x[-1], y[-1]) == (25.0, 0.75)
    assert (x[0], y[0]) == (10.0, 0.25)
    assert accuracy_at_length(x, y, 25.0) == 0.75
    assert accuracy_at_length(x, y, 5.0) == pytest.approx(0.125)
    assert accuracy_at_length(x, y, 100.0) == 0.75
