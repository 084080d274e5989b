"""Endpoints of our own: `GET /lenvm/info`, `POST /lenvm/predict`, `POST /lenvm/values` and the page `GET /lenvm`.

They are ordinary routes of the host's application, so its API key, its CORS and its error pages hold for them too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from lenvm_sglang import admission
from lenvm_sglang.outputs import REPORT_KEY, SEQUENCE_COLUMNS
from lenvm_sglang.schemas import (
    Finished,
    Message,
    Prediction,
    PredictRequest,
    Values,
    ValuesRequest,
    problems,
)

T = TypeVar("T")
ChatPrompt = Callable[[Any, Any], "tuple[list[int] | str, Any]"]
"""From the application and a ChatCompletionRequest to the prompt that the host makes of it, and its images."""


class Prompt(NamedTuple):
    """What the value model is to read.

    Attributes:
        ids: token ids; of a prompt with images None.
        text: of a prompt with images, which the host puts into it.
        images: as the host takes them.
    """

    ids: list[int] | None
    text: str | None = None
    images: Any = None


class ValueModelError(RuntimeError):
    """The value model failed; HTTP 500 with this sentence."""


@dataclass(frozen=True)
class Host:
    """What the endpoints need of the host.

    Attributes:
        app: its application.
        tokenizer_manager: its front end.
        chat_prompt: renders conversations.
        vocabulary: token ids are below it.
        context_length: in tokens.
    """

    app: Any
    tokenizer_manager: Any
    chat_prompt: ChatPrompt
    vocabulary: int
    context_length: int

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a prompt, as the host tokenises it."""
        return list(self.tokenizer_manager.tokenizer.encode(text))

    def completion_ids(self, completion: str | list[int]) -> list[int]:
        """Token ids of what follows a prompt."""
        if isinstance(completion, list):
            return completion
        return list(self.tokenizer_manager.tokenizer.encode(completion, add_special_tokens=False))

    def chat(self, messages: list[Message], template: dict[str, Any] | None) -> Prompt:
        """A conversation as the model is to read it.

        Raises:
            ValueError: the host refuses it.
        """
        from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

        chat = ChatCompletionRequest(model="default", messages=messages, max_tokens=1, chat_template_kwargs=template)
        prompt, images = self.chat_prompt(self.app, chat)
        if images is not None:
            assert isinstance(prompt, str), "the host puts images into a text"
            return Prompt(None, prompt, images)
        return Prompt(self.text_ids(prompt) if isinstance(prompt, str) else list(prompt))

    def chat_ids(self, messages: list[Message], template: dict[str, Any] | None) -> list[int]:
        """Token ids of a conversation without images.

        Raises:
            ValueError: the host refuses it, or it has images.
        """
        ids = self.chat(messages, template).ids
        if ids is None:
            raise ValueError(
                "/lenvm/values does not read images yet; leave them out, or ask for return_length_values in a request."
            )
        return ids

    def check(self, ids: Sequence[int], what: str) -> None:
        """Refuse what the model cannot read, and lengths that leave no room for a token.

        Raises:
            ValueError: saying which.
        """
        wrong = next((i for i in ids if not 0 <= i < self.vocabulary), None)
        if wrong is not None:
            raise ValueError(f"{what} has the token id {wrong}; token ids are from 0 to {self.vocabulary - 1}.")
        if not ids:
            raise ValueError(f"{what} has no tokens.")
        if len(ids) >= self.context_length:
            raise ValueError(
                f"{what} has {len(ids)} tokens; the server's context of {self.context_length} leaves room for "
                f"{self.context_length - 1}."
            )

    async def read(self, prompt: Prompt, request: Any) -> dict[str, Any]:
        """One request that reads a prompt and draws a token nobody wants; its `lenvm` object and `prompt_tokens`."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        params = {"temperature": 0.0, "max_new_tokens": 1, "custom_params": {"return_length_values": True}}
        outputs: AsyncIterator[dict[str, Any]] = self.tokenizer_manager.generate_request(
            GenerateReqInput(input_ids=prompt.ids, text=prompt.text, image_data=prompt.images, sampling_params=params),
            request,
        )
        async for out in outputs:
            if REPORT_KEY in out:
                report = {**out[REPORT_KEY], "prompt_tokens": out["meta_info"]["prompt_tokens"]}
                if None in (report.get("predicted_length", 0), *(x for row in report.get("sequence", ()) for x in row)):
                    raise ValueModelError("the length value model gave NaN or infinity for this prompt.")
                return report
        raise ValueError("the server gave no answer.")


def mount(host: Host, info: dict[str, Any] | None) -> None:
    """Add the endpoints to the host's application; without a LenVM they answer 404 like any unknown path."""
    if info is None:
        return
    from fastapi import Request
    from fastapi.responses import HTMLResponse, JSONResponse

    def refuse(message: str, code: int = 400) -> JSONResponse:
        kind = "invalid_request_error" if code == 400 else "internal_server_error"
        error = {"message": message, "type": kind, "param": None, "code": code}
        return JSONResponse({"error": error}, status_code=code)

    async def answer(work: Callable[[bytes], Coroutine[Any, Any, Sequence[BaseModel]]], body: bytes) -> JSONResponse:
        try:
            data = await work(body)
        except ValidationError as error:
            return refuse(problems(error))
        except ValueError as error:
            return refuse(str(error))
        except ValueModelError as error:
            return refuse(str(error), 500)
        return JSONResponse({"object": "list", "data": [one.model_dump() for one in data]})

    async def lenvm_info() -> dict[str, Any]:
        """The length value model of this server."""
        return info

    async def lenvm_predict(request: Request) -> JSONResponse:
        """Predicted completion length of prompts or conversations; nothing is generated."""
        return await answer(lambda body: _predict(host, body, request), await request.body())

    async def lenvm_values(request: Request) -> JSONResponse:
        """Value, predicted remaining length and quantiles at every token of given completions."""
        if info["heads"] == ["lookahead"]:
            return refuse("/lenvm/values needs a length value model with a backbone; this server's is attached to the "
                          "base model. Ask for return_length_values in a request.")  # fmt: skip
        return await answer(lambda body: _values(host, body, request), await request.body())

    async def lenvm_page() -> HTMLResponse:
        """A page to try length control in."""
        return HTMLResponse(page())

    for handler in (lenvm_predict, lenvm_values):
        handler.__annotations__["request"] = Request  # a local name, which FastAPI cannot look up from a string
    add = host.app.add_api_route
    add("/lenvm/info", lenvm_info, methods=["GET"])
    add("/lenvm/predict", lenvm_predict, methods=["POST"], response_model=None)
    add("/lenvm/values", lenvm_values, methods=["POST"], response_model=None)
    add("/lenvm", lenvm_page, methods=["GET"], response_model=None, include_in_schema=False)


def page() -> str:
    """The page of `GET /lenvm`: one file, no outside scripts."""
    return resources.files("lenvm_sglang").joinpath("page.html").read_text(encoding="utf-8")


async def _predict(host: Host, raw: bytes, request: Any) -> list[Prediction]:
    """Raises: ValueError, what the client must be told."""

    def prompts() -> list[Prompt]:
        body = PredictRequest.model_validate_json(raw)
        conversations = body.conversations if body.messages is None else [body.messages]
        if conversations is not None:
            found = [host.chat(messages, body.chat_template_kwargs) for messages in conversations]
        else:
            prompt: Any = body.prompt
            many = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
            found = [Prompt(host.text_ids(p) if isinstance(p, str) else p) for p in many]
        for i, one in enumerate(found):
            if one.ids is not None:
                host.check(one.ids, f"prompt {i}")
        return found

    asked = await asyncio.to_thread(prompts)
    reports = await _all(host.read(one, request) for one in asked)
    return [
        Prediction(
            index=i,
            predicted_length=r["predicted_length"],
            quantiles=r["quantiles"],
            prompt_tokens=r["prompt_tokens"],
        )
        for i, r in enumerate(reports)
    ]


async def _values(host: Host, raw: bytes, request: Any) -> list[Values]:
    """Raises: ValueError, what the client must be told."""

    def sequences() -> list[tuple[list[int], list[int]]]:
        found = []
        for i, item in enumerate(ValuesRequest.model_validate_json(raw).all):
            prompt, completion = _prompt_ids(host, item), host.completion_ids(item.completion or "")
            host.check(prompt, f"the prompt of item {i}")
            host.check(completion, f"the completion of item {i}")
            host.check([*prompt, *completion], f"item {i}")
            found.append((prompt, completion))
        return found

    async def one(prompt: list[int], completion: list[int]) -> list[list[float]]:
        admission.sequence_from.set(len(prompt) - 1)  # this task's alone
        rows = (await host.read(Prompt(prompt + completion), request))["sequence"]
        if len(rows) != len(completion) + 1:
            raise RuntimeError(f"lenvm: {len(rows)} states of a completion of {len(completion)} tokens came back.")
        return list(rows)

    asked = await asyncio.to_thread(sequences)
    results = await _all(one(prompt, completion) for prompt, completion in asked)
    return [_columns(i, *asked[i], rows) for i, rows in enumerate(results)]


def _prompt_ids(host: Host, item: Finished) -> list[int]:
    if item.messages is not None:
        return host.chat_ids(item.messages, item.chat_template_kwargs)
    return host.text_ids(item.prompt) if isinstance(item.prompt, str) else list(item.prompt or ())


def _columns(index: int, prompt: list[int], completion: list[int], rows: list[list[float]]) -> Values:
    columns = dict(zip(SEQUENCE_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    return Values(
        index=index,
        prompt_tokens=len(prompt),
        completion_tokens=len(completion),
        token_ids=completion,
        values=columns.pop("value"),
        remaining=columns.pop("remaining"),
        quantiles=columns,
    )


async def _all(work: Any) -> list[Any]:
    """Results of coroutines that run side by side; the first failure ends the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
