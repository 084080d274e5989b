"""Bodies of the plug-in's own endpoints and of the `lenvm` object, as pydantic models: what is accepted, what is
answered, and (`lenvm_sglang.openapi`) what `/openapi.json` says of both."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Message = dict[str, Any]
_LENGTHS = "in tokens, stop token included"
_PREDICTED = f"Expected completion length before the first token, {_LENGTHS}."


class _Body(BaseModel):
    """A request body: nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def _exactly_one(self, *names: str) -> None:
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(names)}, got {' and '.join(given) or 'none'}")

    def _not_empty(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and (len(value) == 0 or (isinstance(value, list) and [] in value)):
                raise ValueError(f"{name} is empty")


class PredictRequest(_Body):
    """Body of `POST /lenvm/predict`: exactly one of prompt, messages, conversations."""

    prompt: str | list[int] | list[str] | list[list[int]] | None = Field(
        None, description="A text, token ids, or a list of either."
    )
    messages: list[Message] | None = Field(None, description="One conversation.")
    conversations: list[list[Message]] | None = Field(None, description="Many conversations.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="For the chat template of conversations.")
    model: str | None = Field(None, description="Ignored; for clients that always send it.")

    @model_validator(mode="after")
    def _one_source(self) -> PredictRequest:
        self._exactly_one("prompt", "messages", "conversations")
        self._not_empty("prompt", "messages", "conversations")
        return self


class Finished(_Body):
    """A prompt with its completion: exactly one of prompt and messages."""

    prompt: str | list[int] | None = Field(None, description="A text or token ids.")
    messages: list[Message] | None = Field(None, description="A conversation, rendered by the chat template.")
    completion: str | list[int] | None = Field(
        None, description="What followed: a text (tokenised without special tokens), or the exact token ids."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="For the chat template of `messages`.")

    def check(self) -> None:
        """Raises: ValueError, saying what is missing or too much."""
        self._exactly_one("prompt", "messages")
        if self.completion is None:
            raise ValueError("completion is missing; give a text or token ids")
        self._not_empty("prompt", "messages", "completion")


class ValuesItem(Finished):
    """One of many."""

    @model_validator(mode="after")
    def _whole(self) -> ValuesItem:
        self.check()
        return self


class ValuesRequest(Finished):
    """Body of `POST /lenvm/values`: one prompt with its completion, or many of them in `items`."""

    items: list[ValuesItem] | None = Field(None, description="Many prompts with their completions.")
    model: str | None = Field(None, description="Ignored; for clients that always send it.")

    @model_validator(mode="after")
    def _one_or_many(self) -> ValuesRequest:
        if self.items is None:
            self.check()
            return self
        self._not_empty("items")
        for name in ("prompt", "messages", "completion", "chat_template_kwargs"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} stands beside items; put it into an item, or drop items")
        return self

    @property
    def all(self) -> list[Finished]:
        """The items, or this one."""
        return list(self.items) if self.items is not None else [self]


class Prediction(BaseModel):
    """Predicted completion length of one prompt."""

    object: Literal["lenvm.prediction"] = "lenvm.prediction"
    index: int
    predicted_length: float = Field(description=f"Expected completion length {_LENGTHS}.")
    quantiles: dict[str, float] = Field(description=f"p10, p50, p90 of the completion length {_LENGTHS}.")
    prompt_tokens: int


class Values(BaseModel):
    """Every state of a completion of L tokens: lists of L + 1, entry t belongs to the state after t tokens (entry 0 is
    the prompt alone). After a stop token nothing remains: value, length and quantiles are 0."""

    object: Literal["lenvm.values"] = "lenvm.values"
    index: int
    prompt_tokens: int
    completion_tokens: int
    token_ids: list[int] = Field(description="The completion, L token ids.")
    values: list[float] = Field(description="V in (-1, 0]: the predicted discounted return.")
    remaining: list[float] = Field(description=f"Predicted remaining length {_LENGTHS}.")
    quantiles: dict[str, list[float]] = Field(description=f"p10, p50, p90 of the remaining length {_LENGTHS}.")


class LengthReport(BaseModel):
    """The `lenvm` object of an answer to a request with length fields."""

    predicted_length: float | None = Field(description=_PREDICTED)
    target: int | None = Field(description="`length_target` of the request.")
    mode: str | None = Field(description="`length_mode` of the request; null without a target.")
    achieved: int = Field(
        description="Completion tokens, stop token included; with `scope`, those of the thinking or of the answer."
    )
    scope: str | None = Field(None, description="`length_scope` of the request, where it is not `all`.")
    values: list[float | None] | None = Field(
        None, description="With `return_length_values`: predicted remaining length after each token."
    )
    quantiles: dict[str, float | None] | None = Field(
        None, description="With `return_length_values`: p10, p50, p90 of the completion length at the prompt."
    )


class LengthDelta(BaseModel):
    """`lenvm_delta` of a streamed choice, with `return_length_values`."""

    predicted_length: float | None = Field(description=_PREDICTED)
    values: list[float | None] = Field(description="Predicted remaining length after each token since the last delta.")


_EXPECTED = {
    "prompt": "a text, token ids, or (for /lenvm/predict) a list of either",
    "completion": "a text or token ids",
}


def _complaint(error: Any) -> str:
    """One error; the branches of a union count as one."""
    path = [str(part) for part in error["loc"]]
    for i, part in enumerate(path):
        if part in _EXPECTED and len(path) > i + 1:
            return f"{'.'.join(path[: i + 1])}: must be {_EXPECTED[part]}"
    return f"{'.'.join(path) or 'body'}: {error['msg']}"


def problems(error: ValidationError) -> str:
    """A validation error as one sentence."""
    found = error.errors()
    parts = list(dict.fromkeys(map(_complaint, found)))
    more = f" (and {len(parts) - 4} more)" if len(parts) > 4 else ""
    return f"{'; '.join(parts[:4])}{more}.".replace("Value error, ", "")
