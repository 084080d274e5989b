"""An LLM judge of answers, through any OpenAI-compatible endpoint: one whole number from 1 to 10 an answer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lenvm.evaluation.client import Answer, JsonLog, answered, run_together

QUESTION = """Rate the answer to the task below from 1 (useless) to 10 (excellent): is it relevant, coherent, fluent \
and complete as it stands? Do not judge whether it has the length that the task asks for.

[Task]
{task}

[Answer]
{answer}

Reply with the number alone."""
_NUMBER = re.compile(r"(?<![\d.])(10|[1-9])(?![\d.]*\d)")
REPLY_TOKENS = 16


@dataclass(frozen=True)
class JudgeSettings:
    """Where the judge is.

    Attributes:
        url: of the endpoint, with or without /v1; OPENAI_API_KEY is sent if it is set.
        model: its name there.
        concurrency: requests in flight.
    """

    url: str
    model: str
    concurrency: int = 16


def rating(reply: str) -> int | None:
    """The first whole number from 1 to 10 in a reply; None if there is none."""
    found = _NUMBER.search(reply)
    return None if found is None else int(found[1])


async def judge_answers(
    answers: Sequence[Answer],
    task: Callable[[Answer], str],
    settings: JudgeSettings,
    log: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, int | None]:
    """Ratings by request key; None where the judge's reply held no number.

    Args:
        answers: what is judged; an answer without text gets 1 without being sent.
        task: the text that was asked.
        settings: the judge.
        log: JSONL file of replies, taken up where it stands.
        progress: called with replies so far and their total.

    Raises:
        EvaluationError: if the endpoint refuses or cannot be reached, or the log is another judge's.
    """
    import openai

    kept = JsonLog(log, {"judge": settings.model, "question": QUESTION})
    client = openai.AsyncOpenAI(
        base_url=settings.url.rstrip("/").removesuffix("/v1") + "/v1", api_key=os.environ.get("OPENAI_API_KEY", "none")
    )
    found: dict[str, int | None] = {a.request.key: 1 for a in answers if not a.text.strip()}
    for answer in answers:
        row = kept.rows.get(answer.request.key)
        if row is not None:
            found[answer.request.key] = rating(str(row["reply"]))
    waiting = iter([a for a in answers if a.request.key not in found])

    async def work() -> None:
        for answer in waiting:  # the iterator is shared: each answer is taken once
            content = QUESTION.format(task=task(answer), answer=answer.text)
            response = await answered(
                client.chat.completions.create(
                    model=settings.model,
                    messages=[{"role": "user", "content": content}],
                    temperature=0.0,
                    max_tokens=REPLY_TOKENS,
                ),
                f"the judge at {settings.url}",
            )
            reply = response.choices[0].message.content or ""
            kept.add({"key": answer.request.key, "reply": reply})
            found[answer.request.key] = rating(reply)
            progress(len(found), len(answers))

    progress(len(found), len(answers))
    try:
        await run_together([work() for _ in range(settings.concurrency)])
    finally:
        await client.close()
    return found
