"""Problems with a checkable answer, from GSM8K's, MATH500's, MathVista's or any other JSONL file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm.evaluation.data import read_rows
from lenvm.evaluation.errors import EvaluationError
from lenvm.instructions import MATH, instructed
from lenvm.sampling.errors import SamplingError
from lenvm.sampling.images import PromptImage, openai_messages, place_images, read_images

QUESTION_KEYS = ("question", "problem")
IMAGE_KEYS = ("images", "image")


@dataclass(frozen=True)
class Problem:
    """One problem: the chat that asks it, the answer as the file writes it, and the images that the chat shows."""

    id: str
    messages: list[dict[str, Any]]
    answer: str
    images: tuple[PromptImage, ...] = ()

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The messages as they are sent, images inside."""
        return openai_messages(self.messages, self.images) if self.images else self.messages


def read_problems(
    path: Path, limit: int | None = None, instruction: str = MATH, question: str | None = None
) -> list[Problem]:
    """Read a file of problems.

    Args:
        path: JSONL: `messages` and `answer`, or a question and `answer`; with `images` (or `image`), paths beside the
            file or absolute.
        limit: only so many, spread evenly over the file.
        instruction: put before a bare question and an empty line; empty for none.
        question: key of the question; default: the first of `question`, `problem` that a row has.

    Raises:
        EvaluationError: for a missing or empty file, a broken line, a row without question or answer, or an image
            that cannot be opened.
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
        text = instructed(instruction, str(row[key])) if key else ""
        messages = row.get("messages", [{"role": "user", "content": text}])
        column = next((k for k in IMAGE_KEYS if row.get(k)), None)
        images: tuple[PromptImage, ...] = ()
        if column is not None:
            try:
                images = read_images(row[column], where, column, path.parent, None)
                messages = place_images(messages, len(images), where)
            except SamplingError as error:
                raise EvaluationError(str(error)) from None
        name = str(row.get("id", row.get("unique_id", row.get("pid", number))))
        found.append(Problem(name, messages, str(row["answer"]), images))
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
