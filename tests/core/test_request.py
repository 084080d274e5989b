"""Request fields: every wrong value, unknown name and contradiction, and what a good request becomes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm.guidance import Control, Mode
from lenvm.request import FIELD_NAMES, LengthFieldError, LengthRequest

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"length_target": 0}, "length_target", "at least 1, got 0"),
    ({"length_target": -3}, "length_target", "got -3"),
    ({"length_target": 2.5}, "length_target", "got 2.5"),
    ({"length_target": "12"}, "length_target", "got '12'"),
    ({"length_target": True}, "length_target", "got True"),
    ({"length_target": [5]}, "length_target", r"got \[5\]"),
    ({"length_target": 2**40}, "length_target", "whole number"),
    (
        {"length_target": 5, "length_mode": "exactly"},
        "length_mode",
        "one of equal_to, at_most, at_least, got 'exactly'",
    ),
    ({"length_target": 5, "length_mode": 3}, "length_mode", "got 3"),
    ({"length_target": 5, "length_control": "magic"}, "length_control", "one of posterior, hard, soft"),
    ({"length_target": 5, "length_sharpness": 0}, "length_sharpness", "above 0"),
    ({"length_target": 5, "length_sharpness": float("inf")}, "length_sharpness", "got inf"),
    ({"length_target": 5, "length_sharpness": "2"}, "length_sharpness", "got '2'"),
    ({"length_target": 5, "length_control": "hard", "length_sharpness": 2}, "length_sharpness", "not to 'hard'"),
    ({"length_target": 5, "length_tolerance": 1}, "length_tolerance", "not including, 1"),
    ({"length_target": 5, "length_tolerance": -0.1}, "length_tolerance", "got -0.1"),
    ({"length_target": 5, "length_mode": "at_most", "length_tolerance": 0.1}, "length_tolerance", "not to 'at_most'"),
    ({"length_target": 5, "length_strict": "yes"}, "length_strict", "true or false, got 'yes'"),
    ({"length_target": 5, "length_strict": 1}, "length_strict", "got 1"),
    ({"length_target": 5, "length_bias": -1}, "length_bias", "contradict"),
    ({"length_bias": "short"}, "length_bias", "got 'short'"),
    ({"length_bias": float("nan")}, "length_bias", "got nan"),
    ({"length_bias": 1e9}, "length_bias", "between"),
    ({"length_bias": 10**400}, "length_bias", "finite"),
    ({"length_target": "x" * 10**6}, "length_target", r"got 'xxx.*\.\.\.xxx"),
    ({"length_" + "x" * 10**6: 1}, "length_" + "x" * 73, "unknown field"),
    ({"length_target": 5, "length_scope": "reply"}, "length_scope", "one of all, thinking, answer, got 'reply'"),
    ({"length_target": 5, "length_scope": ["all"]}, "length_scope", "one of all"),
    ({"length_scope": "answer"}, "length_scope", "needs length_target"),
    ({"length_target": 5, "length_scope": "thinking", "length_strict": True}, "length_scope", "cannot be strict"),
    ({"length_bias": 1, "length_mode": "at_most"}, "length_mode", "needs length_target"),
    ({"length_mode": "at_most"}, "length_mode", "needs length_target"),
    ({"length_strict": True}, "length_strict", "needs length_target"),
    ({"return_length_values": "yes"}, "return_length_values", "true or false"),
    ({"length_taget": 5}, "length_taget", "did you mean 'length_target'"),
    ({"length_gamma": 0.99}, "length_gamma", "unknown field"),
]


@pytest.mark.parametrize(("body", "param", "says"), BAD, ids=[json.dumps(b)[:60] for b, _, _ in BAD])
def test_refused(body: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(LengthFieldError, match=says) as error:
        LengthRequest.parse({"model": "x", **body})
    assert error.value.param == param
    assert "\n" not in str(error.value)


def test_absent_and_null_fields() -> None:
    assert LengthRequest.parse({"model": "x", "max_tokens": 5}) is None
    assert LengthRequest.parse(dict.fromkeys(FIELD_NAMES)) is None
    assert LengthRequest.parse({"return_length_values": False}) is None


def test_defaults() -> None:
    request = LengthRequest.parse({"length_target": 40})
    assert request == LengthRequest(target=40, mode="equal_to", control="posterior", sharpness=2.0)
    assert request.control_code == Control.POSTERIOR and request.mode_code == Mode.EQUAL_TO and request.steers
    assert LengthRequest.parse({"length_target": 40, "length_mode": "at_most"}).sharpness == 1.0  # type: ignore[union-attr]
    only_values = LengthRequest.parse({"return_length_values": True})
    assert only_values is not None and not only_values.steers and only_values.control_code == Control.NONE
    tilt = LengthRequest.parse({"length_bias": -3})
    assert tilt is not None and tilt.control_code == Control.BIAS and tilt.steers


good_bodies = st.one_of(
    st.fixed_dictionaries(
        {"length_target": st.integers(1, 10_000)},
        optional={
            "length_strict": st.booleans(),
            "return_length_values": st.booleans(),
            "length_sharpness": st.floats(0.01, 100),
            "length_mode": st.sampled_from(["equal_to", "at_most", "at_least"]),
        },
    ),
    st.fixed_dictionaries({"length_bias": st.floats(-100, 100)}, optional={"return_length_values": st.booleans()}),
)


@given(good_bodies)
def test_travels_as_scalars(body: dict[str, Any]) -> None:
    request = LengthRequest.parse(body)
    assert request is not None
    carried = json.loads(json.dumps(request.to_dict()))
    assert all(isinstance(v, (str, int, float, bool)) for v in carried.values())
    assert LengthRequest.from_dict(carried) == request


@given(
    st.dictionaries(
        st.sampled_from([*FIELD_NAMES, "length_x"]),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=5),
            st.lists(st.integers(), max_size=2),
        ),
    )
)
def test_nothing_but_a_field_error_ever_comes_out(body: dict[str, Any]) -> None:
    try:
        request = LengthRequest.parse(body)
    except LengthFieldError:
        return
    assert request is None or request.steers or request.return_values


def test_contradictions_with_other_fields() -> None:
    exact = LengthRequest.parse({"length_target": 50})
    most = LengthRequest.parse({"length_target": 50, "length_mode": "at_most"})
    least = LengthRequest.parse({"length_target": 50, "length_mode": "at_least"})
    assert exact and most and least
    for request in (exact, least):
        with pytest.raises(LengthFieldError, match=r"length_target 50 .* cannot be reached with max_tokens 20"):
            request.check_against(max_tokens=20)
    most.check_against(max_tokens=20)
    for request in (exact, most):
        request.check_against(max_tokens=None, min_tokens=49)
        for minimum in (50, 60):  # the stop token comes behind min_tokens others
            with pytest.raises(LengthFieldError, match=f"contradicts min_tokens {minimum}"):
                request.check_against(max_tokens=None, min_tokens=minimum)
    least.check_against(max_tokens=None, min_tokens=60)
    with pytest.raises(LengthFieldError, match="ignore_eos"):
        exact.check_against(max_tokens=None, ignore_eos=True)
    LengthRequest(bias=1.0).check_against(max_tokens=1, ignore_eos=True)
