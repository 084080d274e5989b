"""Prompts and the base model's own completions of them, read from JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.grading import grade
from lenvm.evaluation.metrics import Floats


@dataclass(frozen=True)
class Sample:
    """One completion of the base model: its token ids (stop token included where it stopped) and its text."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str

    @property
    def length(self) -> int:
        """L in tokens."""
        return len(self.token_ids)


@dataclass(frozen=True)
class NaturalPrompt:
    """A held-out prompt with what the base model answers by itself.

    Attributes:
        id: the prompt's id.
        messages: chat messages.
        token_ids: the prompt as the base model saw it; state s_0 is its last token.
        samples: completions at temperature 1.
        answer: the checkable final answer; None for an open task.
        kind: the prompt file's own label.
    """

    id: str
    messages: list[dict[str, Any]]
    token_ids: tuple[int, ...]
    samples: tuple[Sample, ...]
    answer: str | None = None
    kind: str = ""
    lengths: NDArray[np.int64] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", np.array([s.length for s in self.samples], dtype=np.int64))

    @property
    def ended_lengths(self) -> NDArray[np.int64]:
        """L of the completions that ended by themselves, whose length is known; of all where none did."""
        ended = np.array([s.finish_reason == "stop" for s in self.samples])
        return self.lengths[ended] if ended.any() else self.lengths

    def is_right(self, text: str, finish_reason: str) -> bool:
        """Whether an answer is right. One that was cut by max_tokens is not: its last number may be half a number.

        Raises:
            ValueError: if the prompt has no checkable answer.
        """
        if self.answer is None:
            raise ValueError(f"prompt {self.id} has no checkable answer.")
        return finish_reason == "stop" and grade(text, self.answer)

    def correct(self) -> Floats:
        """[N] 1.0 where the base model's own completion is right."""
        return np.array([float(self.is_right(s.text, s.finish_reason)) for s in self.samples])


@dataclass(frozen=True)
class NaturalData:
    """All held-out prompts that have samples, and how they were sampled."""

    prompts: tuple[NaturalPrompt, ...]
    sampling: dict[str, Any]
    model: str

    @property
    def problems(self) -> tuple[NaturalPrompt, ...]:
        """The prompts with a checkable answer."""
        return tuple(p for p in self.prompts if p.answer is not None)

    @property
    def by_id(self) -> dict[str, NaturalPrompt]:
        """The prompts by their id."""
        return {p.id: p for p in self.prompts}


def read_natural(prompts_file: Path, samples_file: Path, limit: int | None = None, domain: str = "kind") -> NaturalData:
    """Read a prompt file and the completions `lenvm sample` drew for it.

    Args:
        prompts_file: JSONL, one prompt a line: id, messages, optional answer and kind.
        samples_file: JSONL, one completion a line, as `lenvm sample` writes it.
        limit: keep only this many prompts, the first of the file that have samples.
        domain: the prompt file's key that becomes `kind`.

    Raises:
        EvaluationError: if a file or a key is missing, if no prompt has at least two samples, or if samples were
            drawn with different settings.
    """
    samples: dict[str, list[dict[str, Any]]] = {}
    settings: dict[str, dict[str, Any]] = {}
    model = ""
    for where, row in read_rows(samples_file):
        need(row, ("prompt_id", "prompt_token_ids", "completion", "completion_token_ids", "finish_reason"), where)
        samples.setdefault(str(row["prompt_id"]), []).append(row)
        settings[json.dumps(row.get("sampling", {}), sort_keys=True)] = row.get("sampling", {})
        model = str(row.get("model", model))
    if len(settings) > 1:
        raise EvaluationError(
            f"{samples_file} mixes {len(settings)} sampling settings ({'; '.join(sorted(settings)[:3])}); "
            "evaluate completions drawn with one."
        )
    found: list[NaturalPrompt] = []
    for where, row in read_rows(prompts_file):
        need(row, ("id", "messages"), where)
        if row.get("images"):
            raise EvaluationError(f"{where} has images, which this evaluation cannot ask or read yet; leave it out.")
        drawn = samples.get(str(row["id"]), [])
        if len(drawn) < 2 or (limit is not None and len(found) >= limit):
            continue
        found.append(_prompt(row, drawn, domain))
    if not found:
        raise EvaluationError(
            f"no prompt of {prompts_file} has two or more completions in {samples_file}; "
            "draw some with `lenvm sample --n 64`."
        )
    return NaturalData(tuple(found), next(iter(settings.values())), model)


def _prompt(row: dict[str, Any], drawn: list[dict[str, Any]], domain: str) -> NaturalPrompt:
    answer = row.get("answer")
    return NaturalPrompt(
        id=str(row["id"]),
        messages=row["messages"],
        token_ids=tuple(drawn[0]["prompt_token_ids"]),
        samples=tuple(
            Sample(d["completion"], tuple(d["completion_token_ids"]), d["finish_reason"])
            for d in sorted(drawn, key=lambda d: int(d.get("sample", 0)))
        ),
        answer=None if answer is None or str(answer) == "" else str(answer),
        kind=str(row.get(domain, "")),
    )


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place for messages.

    Raises:
        EvaluationError: for a missing file, or a line that is no JSON object, with its number.
    """
    if not path.is_file():
        raise EvaluationError(f"there is no file {path}; give an existing JSONL file.")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise EvaluationError(
                    f"{path}, line {number} is not JSON ({error.msg}); repair or remove it."
                ) from None
            if not isinstance(row, dict):
                raise EvaluationError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}.")
            yield f"{path}, line {number}", row


def need(row: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Raises: EvaluationError, if a row lacks one of these keys."""
    missing = [k for k in keys if k not in row]
    if missing:
        raise EvaluationError(f"{where} lacks {', '.join(missing)}; it has {', '.join(sorted(row))}.")
