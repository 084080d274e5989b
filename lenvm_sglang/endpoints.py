"""Endpoints of our own: `GET /lenvm/info` and `POST /lenvm/predict`."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from lenvm_sglang.outputs import REPORT_KEY
from lenvm_sglang.responses import collected

Message = dict[str, Any]
_ONE_TOKEN = {"temperature": 0.0, "max_new_tokens": 1}
_WANT_VALUES = {"return_length_values": True}


class PredictRequest(BaseModel):
    """Body of `POST /lenvm/predict`: exactly one of the three.

    Attributes:
        prompt: a text, token ids, or a list of either.
        messages: one conversation.
        conversations: many.
        chat_template_kwargs: for the last two.
    """

    model_config = ConfigDict(extra="forbid")
    prompt: str | list[int] | list[str] | list[list[int]] | None = None
    messages: list[Message] | None = None
    conversations: list[list[Message]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    model: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> PredictRequest:
        given = [n for n in ("prompt", "messages", "conversations") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of prompt, messages, conversations, got {given or 'none'}")
        if getattr(self, given[0]) in ([], "", [[]]):
            raise ValueError(f"{given[0]} is empty")
        return self


class Prediction(BaseModel):
    """Predicted completion length of one prompt, in tokens, stop token included."""

    object: Literal["lenvm.prediction"] = "lenvm.prediction"
    index: int
    predicted_length: float
    quantiles: dict[str, float]
    prompt_tokens: int


class PredictError(ValueError):
    """A prompt the host refuses."""


def mount(app: Any, tokenizer_manager: Any, info: dict[str, Any] | None) -> None:
    """Add the endpoints to the host's application; without a LenVM they answer 404 like any unknown path."""
    if info is None:
        return
    from fastapi import Request
    from fastapi.responses import JSONResponse

    def refuse(message: str) -> JSONResponse:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": 400}
        return JSONResponse({"error": error}, status_code=400)

    async def lenvm_info() -> dict[str, Any]:
        return info

    async def lenvm_predict(request: Request) -> JSONResponse:
        try:
            body = PredictRequest.model_validate_json(await request.body())
            data = await _predict(body, request, tokenizer_manager)
        except ValidationError as error:
            return refuse(_problems(error))
        except ValueError as error:
            return refuse(str(error))
        return JSONResponse({"object": "list", "data": [p.model_dump() for p in data]})

    # the annotation is a local name, which FastAPI cannot look up from a string
    lenvm_predict.__annotations__["request"] = Request
    app.add_api_route("/lenvm/info", lenvm_info, methods=["GET"])
    app.add_api_route("/lenvm/predict", lenvm_predict, methods=["POST"], response_model=None)


async def _predict(body: PredictRequest, request: Any, tokenizer_manager: Any) -> list[Prediction]:
    """One decoding step for each prompt, which the prompt boundary's prediction travels with.

    Raises:
        ValueError: the host refuses a prompt (too long, a bad conversation).
    """
    conversations = body.conversations if body.messages is None else [body.messages]
    if conversations is not None:
        chats = (_predict_chat(i, c, body, request) for i, c in enumerate(conversations))
        return list(await asyncio.gather(*chats))
    from sglang.srt.managers.io_struct import GenerateReqInput

    prompt = body.prompt
    single = isinstance(prompt, str) or isinstance(prompt[0], int)  # type: ignore[index]
    prompts = [prompt] if single else prompt
    name = "text" if isinstance(prompts[0], str) else "input_ids"  # type: ignore[index]
    params = {**_ONE_TOKEN, "custom_params": _WANT_VALUES}
    outputs = tokenizer_manager.generate_request(
        GenerateReqInput(**{name: prompts, "sampling_params": params}), request
    )
    async for batch in outputs:
        return [_prediction(i, out[REPORT_KEY], out["meta_info"]["prompt_tokens"]) for i, out in enumerate(batch)]
    raise PredictError("the server gave no answer.")


async def _predict_chat(index: int, messages: list[Message], body: PredictRequest, request: Any) -> Prediction:
    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest

    chat = ChatCompletionRequest(
        model=body.model or "default",
        messages=messages,
        max_tokens=1,
        temperature=0.0,
        custom_params=_WANT_VALUES,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    reports: dict[int, Any] = {}
    token = collected.set(reports)
    try:
        response = await request.app.state.openai_serving_chat.handle_request(chat, request)
    finally:
        collected.reset(token)
    if 0 not in reports:
        raise PredictError(_host_message(response))
    return _prediction(index, reports[0], response.usage.prompt_tokens)


def _host_message(response: Any) -> str:
    """The sentence of an error that the host answered."""
    try:
        body = json.loads(response.body)
        return str(body.get("error", body)["message"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return "the server gave no answer."


def _problems(error: ValidationError) -> str:
    parts = (f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors())
    return f"{'; '.join(parts)}.".replace("Value error, ", "")


def _prediction(index: int, report: dict[str, Any], prompt_tokens: int) -> Prediction:
    return Prediction(
        index=index,
        predicted_length=report["predicted_length"],
        quantiles=report["quantiles"],
        prompt_tokens=prompt_tokens,
    )
