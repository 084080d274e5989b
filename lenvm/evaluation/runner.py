"""The whole evaluation against one server: ask, score, predict, assemble."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel

from lenvm.evaluation.assemble import TextScore, control_rows, median_rows, natural_summary, trade_off
from lenvm.evaluation.boundary import prediction_table
from lenvm.evaluation.client import Answer, AnswerLog, Asker, ServerSettings, ask_all, prompts_hash
from lenvm.evaluation.criteria import judge
from lenvm.evaluation.data import NaturalData
from lenvm.evaluation.example import ask_example
from lenvm.evaluation.metrics import MODES
from lenvm.evaluation.plan import Request, Sizes, make_plan
from lenvm.evaluation.schema import Example, Results, Speed
from lenvm.evaluation.scoring import base_log_probs, predict_at_prompt
from lenvm.evaluation.speed import Block, in_flight, measure_speed

VERSIONED = ("lenvm", "torch", "transformers", "sglang", "openai", "numpy")


@dataclass(frozen=True)
class Paths:
    """Where things lie. `lenvm` may be None: then nothing is predicted at the prompt."""

    out: Path
    base: Path
    lenvm: Path | None


Notify = Callable[[str, int, int], None]
"""Called with the name of a stage, what is done of it and its total."""


def run_evaluation(
    data: NaturalData, paths: Paths, settings: ServerSettings, sizes: Sizes, notify: Notify, speed: bool = True
) -> Results:
    """Ask, score and assemble; writes nothing but the answers, so that it can be repeated.

    Args:
        data: held-out prompts with the base's samples.
        paths: output directory, base model, length value model.
        settings: the server.
        sizes: how much to ask.
        notify: progress.
        speed: measure tokens/s as well.

    Raises:
        EvaluationError: for a server that refuses or cannot be reached, or an output directory of another run.
    """
    began = time.perf_counter()
    asked = asyncio.run(_ask(data, paths, settings, sizes, notify, speed))
    answers = asked.answers
    prompts = data.by_id
    controlled = [a for a in answers if a.request.experiment in MODES]
    log_probs = score_answers(controlled, lambda r: prompts[r.prompt_id].token_ids, paths.base, notify)
    prediction = None
    if paths.lenvm is not None and len(data.prompts) > 1:
        notify("predicting at the prompt", 0, 1)
        prediction = prediction_table(
            data.prompts, predict_at_prompt(paths.lenvm, [p.token_ids for p in data.prompts], paths.base, data.sampling)
        )
        notify("predicting at the prompt", 1, 1)
    notify("computing intervals", 0, 1)
    control, side = control_rows(answers, data.by_id, log_probs)
    median, curves = median_rows(answers, data), trade_off(answers, data)
    results = Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - began,
        versions=package_versions(),
        parameters=asked.parameters,
        server=asked.server,
        natural=natural_summary(data),
        control=control,
        side=side,
        median=median,
        trade_off=curves,
        prediction=prediction,
        speed=asked.speed,
        example=asked.example,
        criteria=judge(data, control, median, curves),
    )
    notify("computing intervals", 1, 1)
    return results


@dataclass(frozen=True)
class _Asked:
    answers: list[Answer]
    parameters: dict[str, Any]
    server: dict[str, Any]
    speed: Speed | None
    example: Example | None


async def _ask(
    data: NaturalData, paths: Paths, settings: ServerSettings, sizes: Sizes, notify: Notify, speed: bool
) -> _Asked:
    async with Asker(settings) as asker:
        parameters: dict[str, Any] = {
            "model": asker.model,
            "prompts": prompts_hash(data.prompts),
            "max_tokens": settings.max_tokens,
            "sampling": dict(settings.sampling),
            "sizes": sizes.model_dump(mode="json"),
        }
        log = AnswerLog(paths.out / "requests.jsonl", parameters)
        # Fields of a server without a LenVM would be refused one by one; the example asks first and says it once.
        example = _stored(paths.out / "example.json", Example)
        if example is None:
            example = await ask_example(asker, data, paths.base)
            _store(paths.out / "example.json", example)
        prompts = data.by_id
        answers = await ask_all(
            asker,
            make_plan(data, sizes),
            lambda request: prompts[request.prompt_id].messages,
            log,
            lambda done, total: notify("asking", done, total),
        )
        speeds = _stored(paths.out / "speed.json", Speed)
        concurrency = in_flight(settings.concurrency, len(data.prompts))
        if speed and (speeds is None or speeds.concurrency != concurrency):
            notify("measuring speed", 0, 1)
            speeds = speed_summary(await measure_speed(asker, data.prompts), concurrency)
            _store(paths.out / "speed.json", speeds)
            notify("measuring speed", 1, 1)
        return _Asked(answers, parameters, await asker.info() or {}, speeds, example)


def speed_summary(blocks: list[Block], concurrency: int) -> Speed:
    """Tokens a second of all guided and of all unguided blocks, and their ratio."""
    rate = {}
    for guided in (False, True):
        chosen = [b for b in blocks if b.guided == guided]
        rate[guided] = sum(b.tokens for b in chosen) / sum(b.seconds for b in chosen)
    return Speed(
        concurrency=concurrency,
        unguided=rate[False],
        guided=rate[True],
        ratio=rate[True] / rate[False],
        blocks=[asdict(b) for b in blocks],
    )


def score_answers(
    answers: Sequence[Answer], prompt_ids: Callable[[Request], Sequence[int]], base: Path, notify: Notify
) -> dict[str, TextScore]:
    """Base log-probability a token of every answer that has tokens, by request key.

    Args:
        answers: what to score.
        prompt_ids: token ids of the prompt that a request sent.
        base: directory of the base model.
        notify: progress.
    """
    chosen = [a for a in answers if a.token_ids]
    texts = [(prompt_ids(a.request), a.token_ids) for a in chosen]
    rows = base_log_probs(base, texts, lambda done, total: notify("scoring under the base model", done, total))
    return {a.request.key: TextScore(float(np.mean(row)), float(row[-1])) for a, row in zip(chosen, rows, strict=True)}


async def ask_plan(
    plan: Sequence[Request],
    messages: Callable[[Request], Sequence[Mapping[str, Any]]],
    settings: ServerSettings,
    log: Path,
    parameters: dict[str, Any],
    notify: Notify,
) -> list[Answer]:
    """Ask one server for every request of a plan; taken up where an earlier run stopped.

    Args:
        plan: what to ask.
        messages: the chat that a request sends.
        settings: the server.
        log: JSONL file of answers.
        parameters: what must be the same when the file is continued; model, max_tokens and sampling are added.
        notify: progress.

    Raises:
        EvaluationError: for a server that refuses or cannot be reached, or a log of another run.
    """
    async with Asker(settings) as asker:
        shared = {"model": asker.model, "max_tokens": settings.max_tokens, "sampling": dict(settings.sampling)}
        kept = AnswerLog(log, {**shared, **parameters})
        return await ask_all(asker, plan, messages, kept, lambda done, total: notify("asking", done, total))


def package_versions() -> dict[str, str]:
    """Versions of what was used, as far as it is installed here."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


T = TypeVar("T", bound=BaseModel)


def _stored(path: Path, kind: type[T]) -> T | None:
    return kind.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def _store(path: Path, value: BaseModel | None) -> None:
    if value is not None:
        path.write_text(value.model_dump_json(indent=1) + "\n", encoding="utf-8")
