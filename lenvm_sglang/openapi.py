"""What `/openapi.json` says of length control: the `length_*` fields of the touched routes, the `lenvm` object of their
answers, and our own endpoints. On a server without a length value model the host's schema is left as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lenvm.request import CONTROLS, FIELD_NAMES, MAX_BIAS, MAX_SHARPNESS, MAX_TARGET, MODES, SCOPES
from lenvm_sglang.middleware import CHAT, COMPLETIONS, GENERATE
from lenvm_sglang.outputs import REPORT_KEY
from lenvm_sglang.responses import DELTA_KEY
from lenvm_sglang.schemas import LengthDelta, LengthReport, Prediction, PredictRequest, Values, ValuesRequest

_REF = "#/components/schemas/"
_NEEDS_TARGET = " Needs `length_target`."


def _field(description: str, **schema: Any) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}], "description": description}


FIELDS: dict[str, dict[str, Any]] = {
    "length_target": _field(
        "Wanted `usage.completion_tokens`, stop token included.", type="integer", minimum=1, maximum=MAX_TARGET
    ),
    "length_mode": _field("The constraint; default `equal_to`." + _NEEDS_TARGET, type="string", enum=list(MODES)),
    "length_control": _field(
        "posterior (default): the base model conditioned on the length; hard: arg min / arg max of the value; "
        "soft: tilt until the expected value meets the target." + _NEEDS_TARGET,
        type="string",
        enum=list(CONTROLS),
    ),
    "length_sharpness": _field(
        "Exponent of the posterior; default 2 for equal_to, else 1; larger is tighter and costs naturalness."
        + _NEEDS_TARGET,
        type="number",
        exclusiveMinimum=0,
        maximum=MAX_SHARPNESS,
    ),
    "length_tolerance": _field(
        '"About": relative width of the posterior\'s kernel, `equal_to` only; default 0.' + _NEEDS_TARGET,
        type="number",
        minimum=0,
        exclusiveMaximum=1,
    ),
    "length_strict": _field(
        "Guarantee the bound: stop tokens are banned before it and forced at it; default false." + _NEEDS_TARGET,
        type="boolean",
    ),
    "length_scope": _field(
        "What the target counts of a reasoning model: all (default), its thinking (end tag included), or the answer "
        "behind it. Needs `length_target` and a server with `--reasoning-parser`.",
        type="string",
        enum=list(SCOPES),
    ),
    "length_bias": _field(
        "Exponential tilting: negative is shorter, positive longer; not together with `length_target`.",
        type="number",
        minimum=-MAX_BIAS,
        maximum=MAX_BIAS,
    ),
    "return_length_values": _field(
        "The answer carries the predicted remaining length after each token; default false.", type="boolean"
    ),
}
"""JSON schema of each request field."""
assert tuple(FIELDS) == FIELD_NAMES

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string", "description": "One sentence: what was wrong and what to do."},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "The field at fault."},
                "code": {"type": "integer"},
            },
        }
    },
}
_MODELS: tuple[type[BaseModel], ...] = (LengthReport, LengthDelta, PredictRequest, ValuesRequest, Prediction, Values)
_ENDPOINTS: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
    "/lenvm/predict": (PredictRequest, Prediction),
    "/lenvm/values": (ValuesRequest, Values),
}


def extend(app: Any) -> None:
    """Make the application's OpenAPI document speak of length control; built once, when it is first asked for."""
    original: Callable[[], dict[str, Any]] = app.openapi
    done: list[dict[str, Any]] = []

    def openapi() -> dict[str, Any]:
        if not done:
            done.append(extended(original()))
        return done[0]

    app.openapi = openapi


def extended(document: dict[str, Any]) -> dict[str, Any]:
    """A host's OpenAPI document with everything of ours, in place."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    _, ours = models_json_schema([(m, "validation") for m in _MODELS], ref_template=_REF + "{model}")
    schemas.update(ours["$defs"])
    schemas["LengthFieldError"] = ERROR_SCHEMA
    for path in (CHAT, COMPLETIONS, GENERATE):
        for operation in document["paths"][path].values():
            body = operation["requestBody"]["content"]["application/json"]["schema"]
            schemas[body["$ref"].removeprefix(_REF)]["properties"].update(FIELDS)
            operation["responses"]["200"] = _answer(path)
            operation["responses"]["400"] = _json("A bad or contradictory field.", {"$ref": _REF + "LengthFieldError"})
    for path, (asked, item) in _ENDPOINTS.items():
        operation = document["paths"][path]["post"]
        operation["requestBody"] = {"required": True, **_content({"$ref": _REF + asked.__name__})}
        listed = {"type": "array", "items": {"$ref": _REF + item.__name__}}
        answer = {"type": "object", "properties": {"object": {"const": "list"}, "data": listed}}
        operation["responses"] = {
            "200": _json("In the order of the request.", answer),
            "400": _json("A bad body, or a prompt the server cannot read.", {"$ref": _REF + "LengthFieldError"}),
        }
    return document


def _answer(path: str) -> dict[str, Any]:
    """The 200 of a generating route; only what is ours is spelled out."""
    report = {
        "anyOf": [{"$ref": _REF + "LengthReport"}, {"type": "null"}],
        "description": "Present if the request carried length fields; in streams, with the chunk that ends a choice.",
    }
    delta = {
        "anyOf": [{"$ref": _REF + "LengthDelta"}, {"type": "null"}],
        "description": "In streams with `return_length_values`: what belongs to the tokens that are new.",
    }
    own = {REPORT_KEY: report}
    if path == GENERATE:
        one = {"type": "object", "properties": {**own, DELTA_KEY: delta}}
        schema: dict[str, Any] = {"anyOf": [one, {"type": "array", "items": one}]}
    else:
        choice = {"type": "object", "properties": {**own, DELTA_KEY: delta}}
        schema = {"type": "object", "properties": {**own, "choices": {"type": "array", "items": choice}}}
    answer = _json("The answer; with `stream`, server-sent events of the same shape.", schema)
    answer["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return answer


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, **_content(schema)}
