"""The demo world: determinism, right arithmetic, disjoint splits, and the spread of lengths the demo promises."""

from __future__ import annotations

import hashlib
import random
import re
import statistics

import pytest
import world

SUM = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


def words(text: str) -> int:
    """Tokens of an answer with its stop token: the demo's tokenizer makes every word, number and mark one token."""
    return len(re.findall(r"\w+|[^\w\s]", text)) + 1


@pytest.fixture(scope="module")
def problems() -> list[world.Prompt]:
    return world.draw_prompts(3, 300, "test", {"problem": 1.0})


@pytest.fixture(scope="module")
def groups() -> list[tuple[world.Prompt, list[str]]]:
    rng = random.Random(5)
    return [(prompt, [prompt.write(rng) for _ in range(32)]) for prompt in world.draw_prompts(4, 300, "test")]


def test_same_seed_same_text() -> None:
    first = [(prompt.text, prompt.kind, answer) for prompt, answer in world.draw_corpus(7, 200)]
    assert first == [(prompt.text, prompt.kind, answer) for prompt, answer in world.draw_corpus(7, 200)]
    assert first != [(prompt.text, prompt.kind, answer) for prompt, answer in world.draw_corpus(8, 200)]
    assert [p.text for p in world.draw_prompts(7, 50, "val")] == [p.text for p in world.draw_prompts(7, 50, "val")]


def test_the_text_of_seed_0_is_the_same_on_every_machine() -> None:
    corpus = "".join(prompt.text + answer for prompt, answer in world.draw_corpus(0, 200))
    assert hashlib.sha256(corpus.encode()).hexdigest()[:16] == "9e78209d52eb2eb0"


def test_splits_are_disjoint() -> None:
    base = {prompt.text for prompt, _ in world.draw_corpus(0, 3000)}
    held_out = {split: [p.text for p in world.draw_prompts(0, 200, split)] for split in ("train", "val", "test")}
    for split, texts in held_out.items():
        assert len(set(texts)) == len(texts) == 200
        assert all(world.split_of(text) == split for text in texts)
        assert not base & set(texts)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev': use one of base, train, val, test"):
        world.draw_prompts(0, 1, "dev")


def test_prompts_tell_the_story_that_the_answer_solves(problems: list[world.Prompt]) -> None:
    for prompt in problems:
        total = int(re.search(r"has (\d+)", prompt.text).group(1))
        steps = re.findall(r"(?:first|then|later) (\w+) (\d+)", prompt.text)
        assert 2 <= len(steps) <= 3
        for verb, amount in steps:
            total += int(amount) if verb in world.GAINS else -int(amount)
            assert 1 <= total <= world.MAX_TOTAL
        assert prompt.answer == str(total)


def test_every_answer_to_a_problem_is_right(problems: list[world.Prompt]) -> None:
    rng = random.Random(1)
    for prompt in problems:
        for _ in range(8):
            text = prompt.write(rng)
            assert world.grade(text, prompt.answer)
            sums = SUM.findall(text)
            assert len(sums) >= 2, "every style computes step by step"
            for a, op, b, c in sums:
                assert int(a) + (int(b) if op == "+" else -int(b)) == int(c), text
            for verb, amount in re.findall(r"(?:first|then|later) (\w+) (\d+)", text):
                assert f"{verb} {amount}" in prompt.text, "a clause is repeated as it was told"


def test_every_style_occurs(problems: list[world.Prompt]) -> None:
    rng = random.Random(2)
    texts = [prompt.write(rng) for prompt in problems]
    assert 0.1 < statistics.mean(text.startswith("First ") for text in texts) < 0.35
    assert any("Wait" in text and "therefore" in text for text in texts)
    assert any("Hmm" in text for text in texts)


def test_lengths_are_spread(groups: list[tuple[world.Prompt, list[str]]]) -> None:
    lengths = sorted(words(text) for _, texts in groups for text in texts)
    low, high = (lengths[int(share * len(lengths))] for share in (0.05, 0.95))
    assert high >= 10 * low
    assert 40 <= statistics.mean(lengths) <= 75
    assert lengths[int(0.999 * len(lengths))] <= 380
    spread = [
        statistics.stdev(ns) / statistics.mean(ns) for _, texts in groups if (ns := [words(text) for text in texts])
    ]
    assert statistics.mean(spread) >= 0.3


def test_a_fair_share_of_the_solutions_fits_in_60_percent_of_the_mean_length(
    groups: list[tuple[world.Prompt, list[str]]],
) -> None:
    problems = [[words(text) for text in texts] for prompt, texts in groups if prompt.kind == "problem"]
    budget = 0.6 * statistics.mean(n for lengths in problems for n in lengths)
    assert 0.18 <= statistics.mean(n <= budget for lengths in problems for n in lengths) <= 0.45
    assert statistics.mean(any(n <= budget for n in lengths) for lengths in problems) >= 0.98


def test_open_answers_depend_on_the_prompt(groups: list[tuple[world.Prompt, list[str]]]) -> None:
    kinds = {prompt.kind for prompt, _ in groups}
    assert kinds == set(world.KINDS)
    for prompt, texts in groups:
        if prompt.answer is None:
            assert len(set(texts)) > 8
            assert all(text[0].isupper() and text.endswith(".") and not text.endswith("..") for text in texts)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("First buys 2: 3 + 2 = 5. Answer: 5", "5", True),
        ("Answer: 5\n", "5", True),
        ("Answer: 15", "5", False),
        ("Answer: 5.5", "5", False),
        ("Answer: 5 and more", "5", False),
        ("5", "5", False),
        ("", "5", False),
        ("Answer: 4. Answer: 5", "5", True),
    ],
)
def test_grade(text: str, answer: str, right: bool) -> None:
    assert world.grade(text, answer) is right
