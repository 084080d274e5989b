"""Final answers are found and compared by value."""

from __future__ import annotations

import pytest

from lenvm.evaluation.grading import final_answer, grade


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Start 12, buys 3: 15. Answer: 15", "15"),
        ("Answer: 4. Wait, no. Answer: 15", "15"),
        ("... so she has <<3*6=18>>18.\n#### 1,234", "1234"),
        ("#### 18", "Janet sells 16.\n#### 18"),
        (r"Thus \boxed{\frac{3}{4}}.", "3/4"),
        (r"\boxed{{a}+{b}}", "{a}+{b}"),
        ("Answer: $18.00", "18"),
        ("Answer: -7.", "-7"),
        ("Answer: 20%", "20"),
        ("Answer:   The Red  Fox.", "the red fox"),
    ],
)
def test_right(text, answer):
    assert grade(text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("15", "15"),  # no mark: no final answer
        ("Answer: 16", "15"),
        ("Answer: 15 Answer: 16", "15"),
        ("Answer:", "15"),
        ("Answer: 1/0", "0"),
        (r"\boxed{15", "15"),
        ("Answer: 15 apples", "15"),
    ],
)
def test_wrong(text, answer):
    assert not grade(text, answer)


def test_the_last_mark_wins_and_ends_with_its_line():
    assert final_answer("Answer: 1\n#### 2\nand so on") == "2"
    assert final_answer(r"#### 2 then \boxed{3}") == "3"
    assert final_answer("nothing") is None
