"""Is the final answer right? Numbers by value, everything else by normalised text."""

from __future__ import annotations

import re
from fractions import Fraction

from lenvm.evaluation.errors import EvaluationError

_MARKS = ("Answer:", "####")
_BOXED = re.compile(r"\\boxed\s*\{")
_NUMBER = re.compile(r"^[-+]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?$|^[-+]?\.\d+$")
_FRACTION = re.compile(r"^([-+]?\d+)\s*/\s*(\d+)$")
SECONDS = 30
"""Time that math-verify may take over one answer. Its own default of 5 marks right answers wrong on a busy machine."""
_LATEX_FRACTION = re.compile(r"^([-+]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}$")


def final_answer(text: str) -> str | None:
    r"""What follows the last "Answer:" or "####", or stands in the last \boxed{...}; None where there is no mark.

    The latest mark in the text wins. An answer after a mark ends with its line.
    """
    best: tuple[int, str] | None = None
    for mark in _MARKS:
        at = text.rfind(mark)
        if at >= 0 and (best is None or at > best[0]):
            rest = text[at + len(mark) :].strip()
            best = (at, rest.splitlines()[0].strip() if rest else "")
    for match in _BOXED.finditer(text):
        inside = _braced(text, match.end())
        if inside is not None and (best is None or match.start() > best[0]):
            best = (match.start(), inside.strip())
    return best[1] if best is not None else None


def grade(text: str, answer: str) -> bool:
    """Whether the completion ends in the expected answer.

    Args:
        text: the completion.
        answer: the expected answer, bare ("18") or with a mark of its own ("... #### 18").

    Returns:
        False where the completion carries no final answer at all.
    """
    given = final_answer(text)
    if given is None:
        return False
    expected = final_answer(answer)
    expected = answer.strip() if expected is None else expected
    a, b = _number(given), _number(expected)
    if a is not None and b is not None:
        return a == b
    return _normalised(given) == _normalised(expected)


def verified(text: str, answer: str) -> bool:
    """Whether the completion's answer equals the expected one: as `grade` says, or as mathematics by math-verify.

    The expected answer is taken as LaTeX, or as a number after "####" (GSM8K). math-verify guards itself with an alarm
    signal, so this must run in the main thread.

    Args:
        text: the completion.
        answer: the expected answer.

    Raises:
        EvaluationError: if math-verify is not installed, or cannot read the expected answer.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise EvaluationError("math-verify is not installed; install lenvm[eval].") from None
    gold = answer.rpartition("####")[2].strip()
    expected = parse(rf"\boxed{{{gold}}}", parsing_timeout=SECONDS)
    if not expected:
        raise EvaluationError(f"math-verify cannot read the expected answer {gold!r}; correct it in the data file.")
    if grade(text, gold):
        return True
    return bool(verify(expected, parse(text, parsing_timeout=SECONDS), timeout_seconds=SECONDS))


def _braced(text: str, start: int) -> str | None:
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return None


def _number(text: str) -> Fraction | None:
    """The value of a plain number: 1,234 / -3.50 / $18 / 20% (as 20) / 3/4 / \\frac{3}{4}; else None."""
    bare = text.strip().strip("$").rstrip(".").removesuffix("%").removesuffix("\\").strip()
    if _NUMBER.match(bare):
        return Fraction(bare.replace(",", ""))
    if match := _FRACTION.match(bare):
        return Fraction(int(match[1]), int(match[2])) if int(match[2]) else None
    if match := _LATEX_FRACTION.match(bare):
        value = Fraction(int(match[2]), int(match[3])) if int(match[3]) else None
        return -value if value is not None and match[1] == "-" else value
    return None


def _normalised(text: str) -> str:
    return re.sub(r"\s+", " ", text.strip().strip("$").rstrip(".")).strip().lower()
