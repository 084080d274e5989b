"""What the page shows of an answer: its tokens, the predicted and true remaining length, and which tokens stand out."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lenvm.evaluation.data import need, read_rows
from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.metrics import Floats
from lenvm.evaluation.pieces import token_pieces
from lenvm.evaluation.samples import SampleRow, read_samples
from lenvm.evaluation.values import StateValues, Text, values_of

WIDEST = 480
OUTLIER = 3.5
"""Robust standard deviations beyond which a TD residual stands out."""


@dataclass(frozen=True)
class Chosen:
    """An answer to show, before anybody read it."""

    name: str
    question: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    stopped: bool
    images: tuple[Path, ...] = ()


def outliers(residuals: Floats) -> np.ndarray:
    """Which tokens changed the expectation unusually much: beyond 3.5 robust standard deviations of this answer's.

    The robust standard deviation is 1.4826 times the median distance from the median; where more than half of the
    tokens change nothing at all, the ordinary one.

    Args:
        residuals: [L] TD residuals.

    Returns:
        [L] bool.
    """
    distance = np.abs(residuals - np.median(residuals))
    scale = 1.4826 * float(np.median(distance)) or float(residuals.std())
    return np.asarray(distance > OUTLIER * scale) if scale > 0 else np.zeros(len(residuals), dtype=bool)


def view_of(chosen: Chosen, pieces: Sequence[str], values: StateValues, gamma: float) -> dict[str, Any]:
    """One answer as the page reads it; lists of L for tokens, of L + 1 for states.

    `true` is what really remained; None for an answer that was cut, whose length nobody knows.
    """
    length = len(chosen.token_ids)
    residuals = values.td_residuals(gamma)

    def numbers(array: Floats | None, digits: int = 2) -> list[float] | None:
        return None if array is None else np.round(array, digits).tolist()

    return {
        "name": chosen.name,
        "question": chosen.question,
        "images": [image_url(path) for path in chosen.images],
        "tokens": list(pieces),
        "remaining": numbers(values.remaining),
        "low": numbers(values.p10),
        "high": numbers(values.p90),
        "true": list(range(length, -1, -1)) if chosen.stopped else None,
        "change": numbers(values.changes()),
        "td": numbers(residuals, 5),
        "outlier": outliers(residuals).tolist(),
    }


def image_url(path: Path) -> str:
    """An image inside the page, at most `WIDEST` pixels wide and high."""
    from PIL import Image

    out = io.BytesIO()
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((WIDEST, WIDEST))
        small.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def choose(
    samples: Path, requests: Path | None = None, prompt_ids: Sequence[str] = (), prompts: int = 3, answers: int = 3
) -> list[Chosen]:
    """Answers of a few prompts: the base's own, and those an evaluation asked for.

    Args:
        samples: the base's completions, as `lenvm sample` writes them.
        requests: requests.jsonl of `lenvm eval control`, for answers of given lengths to the same prompts.
        prompt_ids: which prompts; default: the first of the file.
        prompts: how many, without `prompt_ids`.
        answers: of each prompt and of each controller, at most.

    Raises:
        EvaluationError: for files that cannot be read, or a prompt that is not there.
    """
    rows = read_samples(samples)
    known: dict[str, list[SampleRow]] = {}
    for row in rows:
        known.setdefault(row.prompt_id, []).append(row)
    missing = [p for p in prompt_ids if p not in known]
    if missing:
        raise EvaluationError(f"{samples} has no completion of the prompt {missing[0]!r}.")
    wanted = list(prompt_ids) or list(known)[:prompts]
    asked = _asked(requests, {p: known[p][0] for p in wanted}, answers) if requests else {}
    found: list[Chosen] = []
    for prompt in wanted:
        for k, row in enumerate(known[prompt][:answers]):
            name = f"{prompt} · base, sample {k} · {len(row.token_ids)} tokens"
            stopped = row.finish_reason == "stop"
            found.append(Chosen(name, row.question, row.prompt_token_ids, row.token_ids, stopped, row.images))
        found += asked.get(prompt, [])
    return found


def _asked(path: Path, prompts: dict[str, SampleRow], most: int) -> dict[str, list[Chosen]]:
    found: dict[str, list[Chosen]] = {}
    count: dict[tuple[str, str, str], int] = {}
    for where, row in read_rows(path):
        if "parameters" in row:
            continue
        need(row, ("prompt_id", "experiment", "controller", "token_ids", "finish_reason"), where)
        prompt = prompts.get(str(row["prompt_id"]))
        group = str(row["prompt_id"]), str(row["experiment"]), str(row["controller"])
        if prompt is None or row["controller"] == "base" or not row["token_ids"] or count.get(group, 0) >= most:
            continue
        count[group] = count.get(group, 0) + 1
        target = "" if row.get("target") is None else f" {row['target']}"
        name = f"{group[0]} · {group[1]}{target}, {group[2]} · {len(row['token_ids'])} tokens"
        found.setdefault(group[0], []).append(
            Chosen(
                name,
                prompt.question,
                prompt.prompt_token_ids,
                tuple(row["token_ids"]),
                row["finish_reason"] == "stop",
                prompt.images,
            )
        )
    return found


def read_views(
    chosen: Sequence[Chosen],
    lenvm: Path | None,
    server: str | None,
    tokenizer: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Every chosen answer with its values, as the page reads it.

    Args:
        chosen: what to show.
        lenvm: directory of the LenVM, or None with a server.
        server: address of a server with a LenVM, or None.
        tokenizer: directory of the tokenizer.
        progress: called with answers done and their total.

    Raises:
        EvaluationError: as `values_of` and `token_pieces`.
    """
    values, gamma = values_of(
        [Text(c.prompt_token_ids, c.token_ids, c.stopped, c.images) for c in chosen], lenvm, server, progress
    )
    pieces = token_pieces(tokenizer, [c.token_ids for c in chosen])
    return [view_of(c, p, v, gamma) for c, p, v in zip(chosen, pieces, values, strict=True)]
