"""The base model's completions, read for an evaluation that needs no prompt file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm.evaluation.data import need, read_rows
from lenvm.evaluation.errors import EvaluationError

KEYS = ("prompt_id", "prompt_token_ids", "completion_token_ids", "finish_reason")


@dataclass(frozen=True)
class SampleRow:
    """One completion; see docs/sampling.md."""

    prompt_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: str
    question: str
    model: str
    images: tuple[Path, ...] = ()


def read_samples(path: Path, per_prompt: int | None = None, prompts: int | None = None) -> list[SampleRow]:
    """Read completions as `lenvm sample` writes them.

    Args:
        path: JSONL.
        per_prompt: keep only so many of a prompt, the first of the file.
        prompts: keep only so many prompts, the first of the file.

    Raises:
        EvaluationError: for a missing or empty file, a broken line, or a row without tokens.
    """
    seen: dict[str, int] = {}
    found: list[SampleRow] = []
    for where, row in read_rows(path):
        need(row, KEYS, where)
        prompt = str(row["prompt_id"])
        if (prompt not in seen and len(seen) == prompts) or (per_prompt and seen.get(prompt, 0) >= per_prompt):
            continue
        if not row["completion_token_ids"] or not row["prompt_token_ids"]:
            raise EvaluationError(f"{where} has no tokens; draw it again with `lenvm sample`.")
        seen[prompt] = seen.get(prompt, 0) + 1
        found.append(
            SampleRow(prompt, tuple(row["prompt_token_ids"]), tuple(row["completion_token_ids"]),
                      str(row["finish_reason"]), _question(row), str(row.get("model", "")),
                      tuple(path.parent / name for name in row.get("images") or ()))
        )  # fmt: skip
    if not found:
        raise EvaluationError(f"{path} holds no completion.")
    return found


def _question(row: dict[str, Any]) -> str:
    return "\n".join(_text(m.get("content", "")) for m in row.get("messages", []) if m.get("role") != "system")


def _text(content: Any) -> str:
    """The text of a message; an image is shown as `<image>`."""
    if not isinstance(content, list):
        return str(content)
    return "".join(str(part.get("text", "<image>")) for part in content)
