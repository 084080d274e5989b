"""LIFEBench's items: the data file, the prompts with a constraint in tokens or in words, and how words are counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lenvm.evaluation.data import need, read_rows
from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.metrics import Mode

if TYPE_CHECKING:
    from lenvm.sampling.tokens import PromptTokenizer

Unit = Literal["tokens", "words"]
PHRASES: dict[str, dict[Mode, str]] = {
    "en": {"equal_to": "equal to", "at_most": "at most", "at_least": "at least"},
    "cn": {"equal_to": "等于", "at_most": "至多有", "at_least": "至少有"},
}
COUNTDOWN: dict[str, dict[Unit, str]] = {
    "en": {
        "tokens": "\nKeep count while you write: after every sentence put in brackets how many tokens are left, as in "
        "[120], and end at [0].",
        "words": "\nKeep count while you write: after every sentence put in brackets how many words are left, as in "
        "[120], and end at [0].",
    },
    "cn": {
        "tokens": "\n写作时请倒数:每句话之后用方括号写出还剩多少个token,例如[120],到[0]结束。",
        "words": "\n写作时请倒数:每句话之后用方括号写出还剩多少字,例如[120],到[0]结束。",
    },
}
"""What the countdown controller adds to a task."""
_IDEOGRAPH = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_CHINESE_WORD = re.compile(rf"{_IDEOGRAPH}|[A-Za-z0-9]+")


@dataclass(frozen=True)
class Item:
    """One task; `task` still has the places where constraint and target go."""

    id: str
    category: str
    lang: str
    task: str

    def prompt(self, mode: Mode, target: int, unit: Unit = "tokens", countdown: bool = False) -> str:
        """The task with its constraint.

        Args:
            mode: of the constraint.
            target: in `unit`.
            unit: words as in the benchmark, or tokens as the paper asks: "Your answer must be equal to 512 tokens
                long".
            countdown: also ask to count down while writing.
        """
        text = self.task
        if unit == "tokens" and self.lang == "cn":
            text = text.replace("字数必须", "token数必须").replace("{word_count}字", "{word_count}个token")
        elif unit == "tokens":
            text = text.replace("{word_count} words", "{word_count} tokens")
        phrase = PHRASES[self.lang][mode]
        text = text.replace("{word_count_type}", phrase).replace("{word_count}", str(target))
        return text + COUNTDOWN[self.lang][unit] * countdown


def word_count(text: str, lang: str) -> int:
    """Words of a text: what stands between spaces; in Chinese every ideograph, and every run of letters or digits."""
    return len(_CHINESE_WORD.findall(text)) if lang == "cn" else len(text.split())


def tokens_a_word(items: Sequence[Item], tokenizer: PromptTokenizer) -> dict[str, float]:
    """How many of the base model's tokens a word has, by language, over the tasks themselves."""
    found = {}
    for lang in {item.lang for item in items}:
        texts = [item.task for item in items if item.lang == lang]
        tokens = sum(len(tokenizer.completion_ids(text, stopped=False)) for text in texts)
        found[lang] = tokens / max(1, sum(word_count(text, lang) for text in texts))
    return found


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Read LIFEBench's data file.

    Args:
        path: JSONL with `id`, `category`, `lang` ("en" or "cn") and `task` with its two places.
        limit: only so many items, spread evenly over the file, so that all categories stay in it.

    Raises:
        EvaluationError: for a missing file, a broken line, a language that is not known or a task without its places.
    """
    items: dict[str, Item] = {}
    for where, row in read_rows(path):
        need(row, ("id", "category", "lang", "task"), where)
        if row["lang"] not in PHRASES:
            raise EvaluationError(f"{where}: `lang` is {row['lang']!r}, allowed are {', '.join(PHRASES)}.")
        missing = [p for p in ("{word_count_type}", "{word_count}") if p not in row["task"]]
        if missing:
            raise EvaluationError(f"{where}: `task` has no {missing[0]}, the place where the constraint goes.")
        if str(row["id"]) in items:
            raise EvaluationError(f"{where} repeats the id {row['id']!r}; ids must be unique.")
        items[str(row["id"])] = Item(str(row["id"]), str(row["category"]), str(row["lang"]), str(row["task"]))
    found = list(items.values())
    if not found:
        raise EvaluationError(f"{path} holds no item.")
    if limit is not None and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]
    return found
