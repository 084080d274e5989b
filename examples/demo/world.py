"""The demo world: a small synthetic language whose answers have real length structure.

Two families of prompts:

* ``problem``: an arithmetic word problem of two or three steps. It may be answered tersely ("First buys 3:
  12 + 3 = 15. Answer: 15") or at length: restating, running totals, checks, detours that open with "Wait" or "Hmm" and
  close with "therefore". Every style computes step by step and repeats the clause it is working on, and each position
  has verbs of its own: these are the cues by which a very small model learns to copy the right operand. The last words
  of every style are ``Answer: N``, which :func:`grade` checks.
* ``list``, ``describe``, ``tell``: open tasks. Their answers are short or long by chance and by the prompt's wording.

A third family, ``drill`` (one sum, or the steps of a story said again), is seen by the base model in training and never
asked later.

Everything is drawn from a ``random.Random``: the same seed gives the same text on every machine. The split a prompt
belongs to is a function of its text alone (:func:`split_of`), so no prompt can be in two splits, however many are drawn
and in whatever order.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

KINDS = ("problem", "list", "describe", "tell")
"""Kinds of prompts that are asked of the trained models."""

SPLITS = ("base", "train", "val", "test")
"""``base``: text of the base model. ``train``, ``val``: sampled for the length value model. ``test``: the report."""

_SPLIT_BOUNDS = {"test": 12, "val": 18, "train": 38, "base": 100}  # cumulative per cent of all prompt texts

MAX_TOTAL = 30
"""Largest running total of a problem: few enough sums for a model of about a million parameters to learn in minutes."""

# One gain and one loss for each position in a story: the verb alone says which clause is meant.
LABELS = ("first", "then", "later")
GAINS = ("buys", "finds", "wins")
LOSSES = ("sells", "loses", "eats")
NAMES = {
    **dict.fromkeys(("Tom", "Ben", "Sam", "Max", "Jack", "Leo", "Paul", "Omar"), "He"),
    **dict.fromkeys(("Ann", "Mia", "Eva", "Lily", "Zoe", "Nina", "Rosa", "Kim"), "She"),
}
ITEMS = (
    "apples",
    "pears",
    "books",
    "coins",
    "cards",
    "pens",
    "shells",
    "stones",
    "eggs",
    "nuts",
    "stamps",
    "cups",
    "balls",
    "keys",
    "toys",
)
QUESTIONS = (
    "How many {items} does {name} have?",
    "How many {items} does {name} have now?",
    "How many {items} are left?",
    "How many {items} does {name} have in the end?",
)
# A hint shifts how often the terse style is used. It never decides it.
HINTS = {"Be brief.": 0.3, "": 0.15, "Explain.": 0.08}
_HINT_WEIGHTS = (2, 5, 2)

PLACES = (
    "garden", "kitchen", "harbor", "school", "forest", "market", "castle", "museum", "farm", "station", "park",
    "library", "cellar", "village", "beach", "valley", "attic", "cabin", "meadow", "tower",
)  # fmt: skip
ADJECTIVES = (
    "tiny",
    "small",
    "quiet",
    "old",
    "grand",
    "huge",
    "dusty",
    "bright",
    "cold",
    "warm",
    "green",
    "dark",
    "empty",
    "busy",
    "lovely",
    "strange",
)
COLORS = ("red", "blue", "green", "white", "black", "golden", "brown", "gray", "yellow", "silver")
THINGS = (
    "tree", "flower", "bench", "bird", "cat", "dog", "boat", "rope", "net", "table", "chair", "lamp", "knife",
    "spoon", "pot", "pan", "plate", "desk", "map", "clock", "door", "window", "bell", "wall", "gate", "path", "bush",
    "leaf", "cart", "basket", "fence", "ladder", "hat", "coat", "sign", "statue", "mirror", "box", "candle", "carpet",
)  # fmt: skip
ANIMALS = ("fox", "bear", "owl", "hen", "duck", "deer", "horse", "mouse", "frog", "crab", "wolf", "goat")

ANSWER = re.compile(r"Answer: (-?\d+)\s*$")


@dataclass(frozen=True)
class Step:
    """One step of a problem: ``verb`` gains (``sign`` 1) or loses (-1) ``amount`` items."""

    verb: str
    sign: int
    amount: int

    @property
    def op(self) -> str:
        return "+" if self.sign > 0 else "-"

    @property
    def inverse(self) -> str:
        return "-" if self.sign > 0 else "+"


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what is needed to write answers to it.

    Attributes:
        kind: one of :data:`KINDS`, or ``"drill"``.
        text: the user message.
        answer: the checkable final answer of a problem; ``None`` for open tasks.
        write: draws one answer text from the world's own distribution of answers to this prompt.
    """

    kind: str
    text: str
    answer: str | None
    write: Callable[[random.Random], str]


def split_of(text: str) -> str:
    """The split a prompt text belongs to: a fixed function of the text, so that splits are disjoint by construction."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return next(split for split, bound in _SPLIT_BOUNDS.items() if bucket < bound)


def grade(text: str, answer: str) -> bool:
    """Whether ``text`` ends with ``Answer: <answer>``. The stop token's text must be stripped before."""
    found = ANSWER.search(text)
    return found is not None and int(found.group(1)) == int(answer)


# ------------------------------------------------------------------------------------------------------------ problems


@dataclass(frozen=True)
class Story:
    """The facts of a problem: who has how many of what, and what happens."""

    name: str
    items: str
    start: int
    steps: tuple[Step, ...]

    @property
    def clauses(self) -> list[str]:
        return [f"{label} {step.verb} {step.amount}" for label, step in zip(LABELS, self.steps, strict=False)]

    @property
    def told(self) -> str:
        return f"{self.name} has {self.start} {self.items}. {NAMES[self.name]} {', '.join(self.clauses)}."

    @property
    def totals(self) -> list[int]:
        """Running totals, the starting amount first."""
        totals = [self.start]
        for step in self.steps:
            totals.append(totals[-1] + step.sign * step.amount)
        return totals


def draw_story(rng: random.Random) -> Story:
    """A story of two or three steps whose running totals stay within 1..:data:`MAX_TOTAL`."""
    count = rng.choice((2, 3))
    start = total = rng.randint(3, 20)
    steps = []
    for slot in range(count):
        sign = rng.choice((1, -1))
        if not 1 <= total + sign * 9 <= MAX_TOTAL:  # little room in that direction
            sign = 1 if total < MAX_TOTAL // 2 else -1
        amount = rng.randint(1, min(9, MAX_TOTAL - total if sign > 0 else total - 1))
        steps.append(Step((GAINS if sign > 0 else LOSSES)[slot], sign, amount))
        total += sign * amount
    return Story(rng.choice(list(NAMES)), rng.choice(ITEMS), start, tuple(steps))


def draw_problem(rng: random.Random) -> Prompt:
    story = draw_story(rng)
    hint = rng.choices(list(HINTS), _HINT_WEIGHTS)[0]
    question = rng.choice(QUESTIONS).format(items=story.items, name=story.name)
    text = f"{story.told} {question} {hint}".rstrip()

    def write(rng: random.Random) -> str:
        return write_terse(rng, story) if rng.random() < HINTS[hint] else write_long(rng, story)

    return Prompt("problem", text, str(story.totals[-1]), write)


def write_terse(rng: random.Random, story: Story) -> str:
    """``First buys 3: 12 + 3 = 15, then loses 5: 15 - 5 = 10. Answer: 10``"""
    parts = []
    for clause, step, before, after in zip(story.clauses, story.steps, story.totals, story.totals[1:], strict=False):
        parts.append(f"{clause}: {'now ' if rng.random() < 0.2 else ''}{before} {step.op} {step.amount} = {after}")
    return f"{_sentence(', '.join(parts))}. {'So ' if rng.random() < 0.15 else ''}Answer: {story.totals[-1]}"


def write_long(rng: random.Random, story: Story) -> str:
    """A worked answer. ``care``, drawn once an answer, sets how much restating, checking and wandering there is."""
    care = rng.random()
    name, items, totals = story.name, story.items, story.totals
    out: list[str] = []
    if rng.random() < 0.7 + 0.3 * care:
        out.append(rng.choice(("Let me work this out.", "Let us think step by step.", "We go through it slowly.")))
    if rng.random() < 0.3 + 0.5 * care:
        out.append(f"We want to know how many {items} {name} has.")
    if rng.random() < 0.2 + 0.4 * care:
        out.append(f"The steps are: {', '.join(story.clauses)}.")
    out.append(
        rng.choice((f"At the start {name} has {totals[0]} {items}.", f"{name} starts with {totals[0]} {items}."))
    )
    for i, (clause, step) in enumerate(zip(story.clauses, story.steps, strict=True)):
        before, after = totals[i], totals[i + 1]
        what = f" {items}" if rng.random() < 0.4 else ""
        so = rng.choice(("so", "and", "so now"))
        out.append(f"{NAMES[name]} {clause}{what}, {so} {before} {step.op} {step.amount} = {after}.")
        if rng.random() < 0.5 + 0.4 * care:
            out.append(
                rng.choice((f"Now {name} has {after} {items}.", f"That makes {after} {items}.", f"That is {after}."))
            )
        while rng.random() < 0.55 * care:
            out.append(_detour(rng, story, step, before, after))
    while rng.random() < 0.4 * care:
        recount = ", ".join(f"{label} {total}" for label, total in zip(LABELS, totals[1:], strict=False))
        out.append(f"Wait, let me go over it again: start {totals[0]}, {recount}, therefore {totals[-1]}.")
    out.append(
        rng.choice((f"In the end {name} has {totals[-1]} {items}.", f"Therefore {name} has {totals[-1]} {items}."))
    )
    out.append(f"Answer: {totals[-1]}")
    return " ".join(out)


def _detour(rng: random.Random, story: Story, step: Step, before: int, after: int) -> str:
    back = f"{after} {step.inverse} {step.amount} = {before}"
    again = f"{before} {step.op} {step.amount} = {after}"
    return rng.choice(
        (
            f"Wait, let me check that: {back}, therefore {after} is right.",
            f"Wait, is it {after}? {NAMES[story.name]} {step.verb} {step.amount}, therefore {again}.",
            f"Hmm, let me do that again: {again}, therefore it is {after}.",
            f"Hmm, is that right? Yes, {again}.",
        )
    )


# ---------------------------------------------------------------------------------------------------------- open tasks


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _counted(rng: random.Random, mean: float, most: int) -> int:
    """A count of at least 1 with a long tail: log-normal with sigma 0.7, mean about ``mean``, at most ``most``."""
    return min(most, max(1, round(rng.lognormvariate(0.0, 0.7) * mean * 0.78)))


def draw_list(rng: random.Random) -> Prompt:
    place, adjective = rng.choice(PLACES), rng.choice(ADJECTIVES)
    form, mean = rng.choice(
        (
            ("Name a thing in the {a} {p}.", 0.0),
            ("What do you see in the {a} {p}?", 5.0),
            ("List things in the {a} {p}.", 7.0),
            ("List all things in the {a} {p}.", 16.0),
        )
    )

    def write(rng: random.Random) -> str:
        if mean == 0.0:
            item = rng.choice(THINGS)
            return rng.choice(
                (
                    f"A {item}.",
                    f"A {rng.choice(COLORS)} {item}.",
                    f"There is a {rng.choice(COLORS)} {item}.",
                    f"In the {place} there is a {item}.",
                )
            )
        items = [_item(rng) for _ in range(_counted(rng, mean, 45))]
        opening = rng.choices(("", f"In the {place} there is ", "Here is "), (3, 1, 1))[0]
        return _sentence(f"{opening}{', '.join(items)}.")

    return Prompt("list", form.format(a=adjective, p=place), None, write)


def _item(rng: random.Random) -> str:
    return f"a {rng.choice(COLORS)} {rng.choice(THINGS)}" if rng.random() < 0.35 else f"a {rng.choice(THINGS)}"


def draw_describe(rng: random.Random) -> Prompt:
    place, adjective = rng.choice(PLACES), rng.choice(ADJECTIVES)
    form, mean = rng.choice(
        (
            ("Say in a word what the {p} is like when it is {a}.", 0.0),
            ("Describe the {a} {p}.", 4.0),
            ("What is the {a} {p} like?", 3.0),
            ("Describe the {a} {p} with care.", 9.0),
        )
    )

    def write(rng: random.Random) -> str:
        if mean == 0.0:
            return _sentence(f"{rng.choice(('', 'very ', 'it is ', 'I think it is '))}{rng.choice(ADJECTIVES)}.")
        out = [f"The {place} is {adjective}."] if rng.random() < 0.6 else []
        out += [_sight(rng) for _ in range(_counted(rng, mean, 24))]
        if rng.random() < 0.4:
            out.append(rng.choice((f"All in all it is a {adjective} {place}.", f"That is the {place}.")))
        return " ".join(out)

    return Prompt("describe", form.format(a=adjective, p=place), None, write)


def _sight(rng: random.Random) -> str:
    a, b = rng.sample(THINGS, 2)
    color = rng.choice(COLORS)
    return rng.choice(
        (
            f"There is a {color} {a} near the {b}.",
            f"The {a} is {color}.",
            f"The {a} is very {rng.choice(ADJECTIVES)}.",
            f"You see a {a}.",
            f"On the left is a {a}, on the right a {color} {b}.",
            f"Behind the {a} is a {b}.",
        )
    )


def draw_tell(rng: random.Random) -> Prompt:
    place, adjective, animal = rng.choice(PLACES), rng.choice(ADJECTIVES), rng.choice(ANIMALS)
    size, mean = rng.choice((("short ", 2.0), ("", 5.0), ("long ", 10.0)))
    form = rng.choice(("Tell a {s}story about a {a} {n} in the {p}.", "Tell me a {s}story: a {a} {n} in the {p}."))

    def write(rng: random.Random) -> str:
        out = [f"Once there was a {adjective} {animal} in the {place}."]
        out += [_event(rng, animal) for _ in range(_counted(rng, mean, 22))]
        out.append(rng.choice(("The end.", f"In the end the {animal} was happy.", f"And so the {animal} went home.")))
        return " ".join(out)

    return Prompt("tell", form.format(s=size, a=adjective, n=animal, p=place), None, write)


def _event(rng: random.Random, animal: str) -> str:
    a, b = rng.sample(THINGS, 2)
    name, color = rng.choice(list(NAMES)), rng.choice(COLORS)
    return rng.choice(
        (
            f"The {animal} went to the {a}.",
            f"There it met {name}, who had a {color} {a}.",
            f"It looked for a {a} but found a {b}.",
            f"One day it saw a {a} behind the {b}.",
            "Then it slept.",
            f"{name} gave it a {color} {a}.",
        )
    )


# -------------------------------------------------------------------------------------------------------------- drills


def draw_drill(rng: random.Random) -> Prompt:
    """An exercise for the base model: one sum, or copying the steps of a story and nothing else."""
    story = draw_story(rng)
    if rng.random() < 0.5:
        said = f"{_sentence(', '.join(story.clauses))}."
        return Prompt("drill", f"{story.told} What are the steps?", None, lambda _: said)
    step, before, after = story.steps[0], story.totals[0], story.totals[1]
    line = f"{before} {step.op} {step.amount}"
    return Prompt("drill", f"What is {line}?", str(after), lambda _: f"We get {line} = {after}. Answer: {after}")


# ------------------------------------------------------------------------------------------------------------- drawing

_DRAW: dict[str, Callable[[random.Random], Prompt]] = {
    "problem": draw_problem,
    "list": draw_list,
    "describe": draw_describe,
    "tell": draw_tell,
    "drill": draw_drill,
}
TRAINING_MIX = {"problem": 0.72, "list": 0.06, "describe": 0.05, "tell": 0.05, "drill": 0.12}
PROMPT_MIX = {"problem": 0.55, "list": 0.15, "describe": 0.15, "tell": 0.15}


def draw(rng: random.Random, mix: dict[str, float], split: str) -> Iterator[Prompt]:
    """Endless prompts of ``split``, their kinds by ``mix``."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    while True:
        kind = rng.choices(list(mix), list(mix.values()))[0]
        while split_of((prompt := _DRAW[kind](rng)).text) != split:
            pass
        yield prompt


def draw_prompts(seed: int, count: int, split: str, mix: dict[str, float] | None = None) -> list[Prompt]:
    """``count`` different prompts of ``split``.

    Raises:
        ValueError: the split does not exist.
    """
    found: dict[str, Prompt] = {}
    for prompt in draw(random.Random(f"{split} {seed}"), mix or PROMPT_MIX, split):
        found.setdefault(prompt.text, prompt)
        if len(found) == count:
            break
    return list(found.values())


def draw_corpus(seed: int, count: int) -> Iterator[tuple[Prompt, str]]:
    """``count`` pairs of prompt and answer for the base model, all of split ``base``; prompts may repeat."""
    rng = random.Random(f"corpus {seed}")
    prompts = draw(rng, TRAINING_MIX, "base")
    for _ in range(count):
        prompt = next(prompts)
        yield prompt, prompt.write(rng)
