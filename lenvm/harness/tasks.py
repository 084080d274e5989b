"""What the YAML files of this folder name: where the problems come from, and how an answer is judged."""

from __future__ import annotations

from typing import Any

from lenvm.evaluation.grading import verified
from lenvm.instructions import MATH, instructed

HUB = {"gsm8k": ("openai/gsm8k", "main"), "math500": ("HuggingFaceH4/MATH-500", "default")}


def gsm8k(**metadata: Any) -> Any:
    """GSM8K's test questions: the harness calls this with what `--metadata` says."""
    return _problems("gsm8k", **metadata)


def math500(**metadata: Any) -> Any:
    """MATH-500's problems."""
    return _problems("math500", **metadata)


def _problems(name: str, **metadata: Any) -> Any:
    """The split `test` of a data set: the file that `--metadata` names under the data set's name, or the hub's."""
    from datasets import load_dataset

    if name in metadata:
        return load_dataset("json", data_files={"test": str(metadata[name])})
    path, config = HUB[name]
    return load_dataset(path, config)


def prompt(row: dict[str, Any]) -> str:
    """The user's message: the paper's instruction and the problem."""
    return instructed(MATH, row.get("question") or row["problem"])


def grade(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Right or wrong, as `lenvm eval tradeoff` judges; and the words it took, because the harness sees no tokens."""
    return {"right": float(verified(answers[0], row["answer"])), "words": float(len(answers[0].split()))}
