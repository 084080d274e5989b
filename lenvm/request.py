"""The request fields: what a client may ask, checked before anything else sees it."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lenvm.guidance import Control, Mode

MODES = {"equal_to": Mode.EQUAL_TO, "at_most": Mode.AT_MOST, "at_least": Mode.AT_LEAST}
CONTROLS = {"posterior": Control.POSTERIOR, "hard": Control.HARD, "soft": Control.SOFT}
SCOPES = ("all", "thinking", "answer")
DEFAULT_SHARPNESS = {"equal_to": 2.0, "at_most": 1.0, "at_least": 1.0}

FIELD_NAMES = (
    "length_target",
    "length_mode",
    "length_control",
    "length_sharpness",
    "length_tolerance",
    "length_strict",
    "length_scope",
    "length_bias",
    "return_length_values",
)
PREFIX = "length_"
_NEED_TARGET = (
    "length_mode", "length_control", "length_sharpness", "length_tolerance", "length_strict", "length_scope",
)  # fmt: skip
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
MAX_TARGET = 2**31 - 1
MAX_SHARPNESS = 1000.0
MAX_BIAS = 1e6


class LengthFieldError(ValueError):
    """A length field a server must refuse with HTTP 400.

    Attributes:
        param: the field at fault.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class LengthRequest:
    """Validated length fields of one request (DESIGN section 5).

    Attributes:
        target: wanted completion tokens, stop token included; None for a bias or for values alone.
        mode, control: names as in the API.
        sharpness: exponent a of the posterior.
        tolerance: relative width of `equal_to`'s kernel.
        strict: guarantee the bound.
        scope: which tokens of a reasoning model the target counts: all, its thinking (the end tag included), or what
            follows the end tag.
        bias: beta of exponential tilting; None without `length_bias`.
        return_values: whether the response carries the predicted remaining length of each token.
    """

    target: int | None = None
    mode: str = "equal_to"
    control: str = "posterior"
    sharpness: float = 2.0
    tolerance: float = 0.0
    strict: bool = False
    scope: str = "all"
    bias: float | None = None
    return_values: bool = False

    @property
    def steers(self) -> bool:
        """Whether the answer is guided, rather than only scored."""
        return self.target is not None or self.bias is not None

    @property
    def control_code(self) -> Control:
        """The rule that `lenvm.guidance` applies."""
        if self.bias is not None:
            return Control.BIAS
        return CONTROLS[self.control] if self.target is not None else Control.NONE

    @property
    def mode_code(self) -> Mode:
        return MODES[self.mode]

    def to_dict(self) -> dict[str, Any]:
        """Scalars only, for travelling inside a host's custom parameters; `from_dict` reads it back."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LengthRequest:
        return cls(**values)

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> LengthRequest | None:
        """Read the length fields out of a request body; other fields are not looked at; null counts as absent.

        Returns:
            None if the body asks for nothing.

        Raises:
            LengthFieldError: an unknown `length_*` field, a wrong value, or a contradiction.
        """
        for name in body:
            if name.startswith(PREFIX) and name not in FIELD_NAMES:
                near = difflib.get_close_matches(name[:80], FIELD_NAMES, 1)
                raise LengthFieldError(
                    name[:80],
                    f"unknown field {shown(name)}{f'; did you mean {near[0]!r}?' if near else '.'} "
                    f"The length fields are {', '.join(FIELD_NAMES)}.",
                )
        given = {name: body[name] for name in FIELD_NAMES if body.get(name) is not None}
        if not given:
            return None
        if "length_bias" in given and "length_target" in given:
            raise LengthFieldError(
                "length_bias", "length_bias and length_target contradict each other; send one of them."
            )
        if "length_target" not in given:
            for name in _NEED_TARGET:
                if name in given:
                    raise LengthFieldError(
                        name, f"{name} needs length_target; send length_target as well, or drop {name}."
                    )
        return_values = _boolean(given, "return_length_values")
        if "length_bias" in given:
            bias = _number(
                given, "length_bias", f"a finite number of magnitude at most {MAX_BIAS:g} (negative is shorter)"
            )
            if abs(bias) > MAX_BIAS:
                raise _wrong("length_bias", bias, f"a number between -{MAX_BIAS:g} and {MAX_BIAS:g}")
            return cls(bias=bias, return_values=return_values)
        if "length_target" not in given:
            return cls(return_values=True) if return_values else None

        target = given["length_target"]
        if isinstance(target, bool) or not isinstance(target, int) or not 1 <= target <= MAX_TARGET:
            raise _wrong("length_target", target, "a whole number of tokens, at least 1")
        mode = _choice(given, "length_mode", MODES, "equal_to")
        control = _choice(given, "length_control", CONTROLS, "posterior")
        sharpness = DEFAULT_SHARPNESS[mode]
        if "length_sharpness" in given:
            allowed = f"a number above 0, at most {MAX_SHARPNESS:g}"
            if control != "posterior":
                raise LengthFieldError(
                    "length_sharpness",
                    f"length_sharpness belongs to length_control 'posterior', not to {control!r}; drop it.",
                )
            sharpness = _number(given, "length_sharpness", allowed)
            if not 0 < sharpness <= MAX_SHARPNESS:
                raise _wrong("length_sharpness", sharpness, allowed)
        tolerance = 0.0
        if "length_tolerance" in given:
            if control != "posterior" or mode != "equal_to":
                raise LengthFieldError(
                    "length_tolerance",
                    f"length_tolerance belongs to length_mode 'equal_to' under length_control 'posterior', "
                    f"not to {mode!r} under {control!r}; drop it.",
                )
            tolerance = _number(given, "length_tolerance", "a number from 0 up to, not including, 1")
            if not 0 <= tolerance < 1:
                raise _wrong("length_tolerance", tolerance, "a number from 0 up to, not including, 1")
        strict = _boolean(given, "length_strict")
        scope = given.get("length_scope", "all")
        if scope not in SCOPES:
            raise _wrong("length_scope", scope, f"one of {', '.join(SCOPES)}")
        if scope == "thinking" and strict:
            raise LengthFieldError(
                "length_scope",
                "length_scope 'thinking' cannot be strict, because the end of thinking is no stop token; drop "
                "length_strict, or cap the thinking with the server's own thinking budget.",
            )
        return cls(
            target=target,
            mode=mode,
            control=control,
            sharpness=sharpness,
            tolerance=tolerance,
            strict=strict,
            scope=scope,
            return_values=return_values,
        )

    def check_against(self, *, max_tokens: int | None, min_tokens: int | None = None, ignore_eos: bool = False) -> None:
        """Refuse a target that the request's other fields make impossible.

        Raises:
            LengthFieldError: naming both fields and both values.
        """
        if self.target is None:
            return
        if ignore_eos:
            raise LengthFieldError(
                "length_target", "length_target needs stop tokens, but ignore_eos is true; drop one of them."
            )
        if max_tokens is not None and self.mode != "at_most" and max_tokens < self.target:
            raise LengthFieldError(
                "length_target",
                f"length_target {self.target} ({self.mode}) cannot be reached with max_tokens {max_tokens}; "
                "raise max_tokens or lower length_target.",
            )
        if min_tokens is not None and self.mode != "at_least" and self.scope == "all" and min_tokens >= self.target:
            # a server allows the stop token only behind min_tokens other tokens
            raise LengthFieldError(
                "length_target",
                f"length_target {self.target} ({self.mode}) contradicts min_tokens {min_tokens}, which asks for that "
                "many tokens before the stop token; lower min_tokens or raise length_target.",
            )


def shown(value: Any) -> str:
    """A client's value in an error, which may be megabytes or nested without end."""
    return _SHORT.repr(value)


def _wrong(name: str, got: Any, allowed: str) -> LengthFieldError:
    return LengthFieldError(name, f"{name} must be {allowed}, got {shown(got)}.")


def _number(given: Mapping[str, Any], name: str, allowed: str) -> float:
    value = given[name]
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond every float
        pass
    raise _wrong(name, value, allowed)


def _boolean(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _choice(given: Mapping[str, Any], name: str, allowed: Mapping[str, Any], default: str) -> str:
    value = given.get(name, default)
    if not isinstance(value, str) or value not in allowed:
        raise _wrong(name, value, f"one of {', '.join(allowed)}")
    return value
