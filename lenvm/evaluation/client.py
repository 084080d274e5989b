"""Asking a server for the planned answers with the official OpenAI client: concurrent, resumable, never silent."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from lenvm.evaluation.data import NaturalPrompt
from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.plan import Request


@dataclass(frozen=True)
class Answer:
    """What came back for one request.

    Attributes:
        request: what was asked.
        text: the completion.
        token_ids: its token ids, stop token included where it stopped.
        length: L = usage.completion_tokens.
        finish_reason: "stop" or "length".
        lenvm: the response's `lenvm` object; None for unguided requests.
        seconds: from sending to receiving.
    """

    request: Request
    text: str
    token_ids: tuple[int, ...]
    length: int
    finish_reason: str
    lenvm: dict[str, Any] | None
    seconds: float


T = TypeVar("T")


async def answered(call: Awaitable[T], endpoint: str) -> T:
    """What a call of the OpenAI client gives.

    Args:
        call: the call.
        endpoint: who is asked, for messages.

    Raises:
        EvaluationError: if the endpoint refuses or cannot be reached.
    """
    import openai

    try:
        return await call
    except openai.APIStatusError as error:
        raise EvaluationError(
            f"{endpoint} refused a request with status {error.status_code}: {error.message}"
        ) from None
    except openai.APIConnectionError as error:
        raise EvaluationError(
            f"{endpoint} does not answer ({type(error).__name__}); start it and repeat the command: "
            "answers already received are kept."
        ) from None


@dataclass(frozen=True)
class ServerSettings:
    """Where and how to ask.

    Attributes:
        url: the server's address, with or without /v1.
        concurrency: requests in flight.
        max_tokens: bound of every answer, the one the base's samples were drawn with.
        sampling: temperature, top_p and, where they differ from SGLang's defaults, top_k and min_p: those the base's
            samples were drawn with, because the LenVM has learned the lengths of that distribution.
        timeout: seconds a request may take.
    """

    url: str
    concurrency: int = 16
    max_tokens: int = 512
    sampling: Mapping[str, float] = field(default_factory=lambda: {"temperature": 1.0, "top_p": 1.0})
    timeout: float = 300.0

    @property
    def base_url(self) -> str:
        """The address the OpenAI client takes."""
        return self.url.rstrip("/").removesuffix("/v1") + "/v1"


class Asker:
    """An async context around one OpenAI client and one server.

    Requests are chat completions with the sampling parameters of `settings`.
    """

    def __init__(self, settings: ServerSettings) -> None:
        from openai import AsyncOpenAI

        self.settings = settings
        self._client = AsyncOpenAI(
            base_url=settings.base_url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=settings.timeout,
            max_retries=2,
        )
        self.model = ""
        self._name = f"the server at {settings.url}"

    async def __aenter__(self) -> Asker:
        models = await answered(self._client.models.list(), self._name)
        self.model = models.data[0].id
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def info(self) -> dict[str, Any] | None:
        """GET /lenvm/info; None where the server has no such endpoint."""
        import httpx

        async with httpx.AsyncClient(timeout=30.0) as http:
            response = await http.get(self.settings.base_url.removesuffix("/v1") + "/lenvm/info")
        return dict(response.json()) if response.status_code == 200 else None

    async def candidates(self) -> int:
        """K, the most candidates of a token that the server scores.

        Raises:
            EvaluationError: if the server has no LenVM.
        """
        info = await self.info()
        if not info or "max_candidates" not in info:
            raise EvaluationError(
                f"{self._name} has no length value model: GET /lenvm/info does not say how many candidates it scores; "
                "start it with --lenvm-model."
            )
        return int(info["max_candidates"])

    async def ask(self, request: Request, messages: Sequence[Mapping[str, Any]]) -> Answer:
        """One answer.

        Raises:
            EvaluationError: if the server refuses the request, cannot be reached or leaves out token ids.
        """
        began = time.perf_counter()
        response = await answered(
            self._client.chat.completions.create(
                model=self.model,
                messages=list(messages),  # type: ignore[arg-type]
                max_tokens=self.settings.max_tokens,
                seed=request.seed,
                # in the body, where top_k and min_p, which the client does not know, go beside the others
                extra_body={"return_token_ids": True, **self.settings.sampling, **request.fields},
            ),
            self._name,
        )
        seconds = time.perf_counter() - began
        body: dict[str, Any] = response.model_dump(mode="json")
        choice = body["choices"][0]
        token_ids = choice.get("response_token_ids") or choice.get("token_ids")
        if token_ids is None or body.get("usage") is None:
            raise EvaluationError(
                "the server's answer has no token ids or no usage, so its text cannot be scored; "
                "use a server that knows `return_token_ids` (SGLang 0.5.16 or newer)."
            )
        return Answer(
            request=request,
            text=choice["message"]["content"] or "",
            token_ids=tuple(token_ids),
            length=int(body["usage"]["completion_tokens"]),
            finish_reason=str(choice["finish_reason"]),
            lenvm=choice.get("lenvm") or body.get("lenvm"),
            seconds=seconds,
        )


async def server_candidates(settings: ServerSettings) -> int:
    """K of the server of `settings`, as `Asker.candidates`."""
    async with Asker(settings) as asker:
        return await asker.candidates()


def sampling_of(drawn: Mapping[str, Any]) -> dict[str, float]:
    """What a request says about sampling, from the `sampling` of a row that `lenvm sample` wrote."""
    out = {"temperature": float(drawn.get("temperature", 1.0)), "top_p": float(drawn.get("top_p", 1.0))}
    if drawn.get("top_k", -1) != -1:
        out["top_k"] = int(drawn["top_k"])
    if drawn.get("min_p", 0.0) != 0.0:
        out["min_p"] = float(drawn["min_p"])
    return out


class JsonLog:
    """A JSONL file that is appended to as rows come, and read again on resumption.

    The first line holds the parameters; a later run must agree. Rows are known by their `key`.
    """

    def __init__(self, path: Path, parameters: dict[str, Any]) -> None:
        """Open or create.

        Raises:
            EvaluationError: if the file was written with other parameters.
        """
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size:
            self._resume(parameters)
        else:
            path.write_text(json.dumps({"parameters": parameters}) + "\n", encoding="utf-8")

    def _resume(self, parameters: dict[str, Any]) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # an interruption in the middle of a line
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        rows = [json.loads(line) for line in whole.decode("utf-8").splitlines() if line]
        before = rows[0].get("parameters") if rows else None
        if before is None:
            self.path.write_text(json.dumps({"parameters": parameters}) + "\n", encoding="utf-8")
            return
        wanted = json.loads(json.dumps(parameters))
        for name in sorted({*before, *wanted}):
            if before.get(name) != wanted.get(name):
                raise EvaluationError(
                    f"{self.path} was begun with {name} = {before.get(name)!r}, now it is {wanted.get(name)!r}; "
                    "use the same parameters or another --out."
                )
        self.rows = {row["key"]: row for row in rows[1:]}

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; it is on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows[row["key"]] = row


class AnswerLog:
    """The log of answers, with what was asked for each (server, model, sizes, sampling and hash of the prompts are the
    parameters)."""

    def __init__(self, path: Path, parameters: dict[str, Any]) -> None:
        """Open or create; raises EvaluationError as `JsonLog`."""
        self._log = JsonLog(path, parameters)

    def get(self, request: Request) -> Answer | None:
        """The stored answer to a request; None if there is none.

        Raises:
            EvaluationError: if the stored answer was asked for with other fields or another seed.
        """
        row = self._log.rows.get(request.key)
        if row is None:
            return None
        if row["fields"] != json.loads(json.dumps(request.fields)) or row["seed"] != request.seed:
            raise EvaluationError(
                f"{self._log.path} holds another request under the key {request.key} "
                f"(fields {row['fields']}, seed {row['seed']}); use another --out."
            )
        return Answer(
            request,
            row["text"],
            tuple(row["token_ids"]),
            row["length"],
            row["finish_reason"],
            row["lenvm"],
            row["seconds"],
        )

    def add(self, answer: Answer) -> None:
        """Append one answer; it is on disk when this returns."""
        request = answer.request
        self._log.add(
            {
                "key": request.key,
                "experiment": request.experiment,
                "controller": request.controller,
                "prompt_id": request.prompt_id,
                "target": request.target,
                "sample": request.sample,
                "seed": request.seed,
                "fields": request.fields,
                "text": answer.text,
                "token_ids": list(answer.token_ids),
                "length": answer.length,
                "finish_reason": answer.finish_reason,
                "lenvm": answer.lenvm,
                "seconds": round(answer.seconds, 4),
            }
        )


async def ask_all(
    asker: Asker,
    plan: Sequence[Request],
    messages: Callable[[Request], Sequence[Mapping[str, Any]]],
    log: AnswerLog,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Ask for every request of the plan that the log does not hold yet.

    Args:
        asker: an entered Asker; `settings.concurrency` requests are in flight.
        plan: what to ask.
        messages: the chat that a request sends.
        log: where answers are kept.
        progress: called after every answer with answers so far and their total.

    Returns:
        the answers in the order of the plan.

    Raises:
        EvaluationError: at the first refused request; what was received stays in the log.
    """
    found: dict[str, Answer] = {}
    todo: list[Request] = []
    for request in plan:
        answer = log.get(request)
        if answer is None:
            todo.append(request)
        else:
            found[request.key] = answer
    waiting = iter(todo)

    async def work() -> None:
        for request in waiting:  # the iterator is shared: each request is taken once
            answer = await asker.ask(request, messages(request))
            log.add(answer)
            found[request.key] = answer
            progress(len(found), len(plan))

    progress(len(found), len(plan))
    await run_together([work() for _ in range(min(asker.settings.concurrency, len(todo)))])
    return [found[request.key] for request in plan]


async def run_together(coroutines: Sequence[Any]) -> None:
    """Run all; the first failure cancels the rest and is raised."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def prompts_hash(prompts: Sequence[NaturalPrompt]) -> str:
    """Hash of the prompts and of their samples' lengths: what the targets are derived from."""
    digest = hashlib.sha256()
    for p in prompts:
        digest.update(json.dumps([p.id, p.messages, p.answer, p.lengths.tolist()], sort_keys=True).encode())
    return digest.hexdigest()[:16]
