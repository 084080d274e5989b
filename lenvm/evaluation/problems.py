"""Problems with a checkable answer, from GSM8K's, MATH500's or any other JSONL file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm.evaluation.data import read_rows
from lenvm.evaluation.errors import EvaluationError

MATH_INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
"""The paper's, before the question."""
QUESTION_KEYS = ("question", "problem")


@dataclass(frozen=True)
class Problem:
    """One problem: the chat that asks it, and the answer as the file writes it."""

    id: str
    messages: list[dict[str, Any]]
    answer: str


def read_problems(
    path: Path, limit: int | None = None, instruction: str = MATH_INSTRUCTION, question: str | None = None
) -> list[Problem]:
    """Read a file of problems.

    Args:
        path: JSONL: `messages` and `answer`, or a question and `answer`.
        limit: only so many, spread evenly over the file.
        instruction: put before a bare question, on its own line; empty for none.
        question: key of the question; default: the first of `question`, `problem` that a row has.

    Raises:
        EvaluationError: for a missing or empty file, a broken line, or a row without question or answer.
    """
    found: list[Problem] = []
    for number, (where, row) in enumerate(read_rows(path)):
        key = question or next((k for k in QUESTION_KEYS if k in row), None)
        if "messages" not in row and (key is None or key not in row):
            wanted = question or " or ".join(QUESTION_KEYS)
            raise EvaluationError(f"{where} has neither `messages` nor {wanted}; it has {', '.join(sorted(row))}.")
        if str(row.get("answer", "")) == "":
            if "messages" in row:  # a prompt file may hold open tasks too
                continue
            raise EvaluationError(f"{where} has no `answer`; it has {', '.join(sorted(row))}.")
        text = f"{instruction}\n{row[key]}" if instruction and key else str(row.get(key or "", ""))
        messages = row.get("messages", [{"role": "user", "content": text}])
        found.append(Problem(str(row.get("id", row.get("unique_id", number))), messages, str(row["answer"])))
    if not found:
        raise EvaluationError(f"{path} holds no problem with an answer.")
    if len({p.id for p in found}) < len(found):
        raise EvaluationError(f"{path} holds an id twice; ids must be unique.")
    if limit is not None and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]
    return found


def fitting(problems: Sequence[Problem], base: Path, most: int) -> list[Problem]:
    """The problems whose prompts have at most `most` tokens of the base model's.

    Raises:
        EvaluationError: if fewer than two have.
    """
    from lenvm.sampling.tokens import PromptTokenizer

    tokenizer = PromptTokenizer(base)
    found = [p for p in problems if len(tokenizer.prompt_ids(p.messages)) <= most]
    if len(found) < 2:
        raise EvaluationError(
            f"{len(found)} of {len(problems)} prompts have at most {most} tokens; at least 2 are needed: give a larger "
            "--max-prompt-tokens."
        )
    return found
