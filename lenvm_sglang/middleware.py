"""ASGI middleware in front of SGLang's routes: length fields in, the `lenvm` object out.

SGLang drops unknown request fields silently, so they are checked here, before the route: a bad one is HTTP 400 in the
OpenAI error shape and never reaches the scheduler, for streams too. Good ones move into `custom_params`, which SGLang
carries to the scheduler. Requests without a length field pass through untouched, body and response.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lenvm.request import FIELD_NAMES, PREFIX, LengthFieldError, LengthRequest, shown
from lenvm_sglang.admission import (
    ROOM_KEY,
    UNSUPPORTED_COMPANIONS,
    check_companions,
    check_custom_params,
    check_images,
    check_scope,
    parse_fields,
)
from lenvm_sglang.outputs import REPORT_KEY
from lenvm_sglang.responses import DELTA_KEY, Collected, collected

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Fields = dict[str, Any]

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
UNSUPPORTED_PATHS = (
    "/v1/responses",
    "/v1/messages",
    "/api/chat",
    "/api/generate",
    "/invocations",
    "/vertex_generate",
    "/generate_from_file",
)
"""Other ways to generate; length fields there are refused rather than ignored."""
UNSUPPORTED_PARTS = ("video_url", "audio_url", "input_audio")
IMAGE_PARTS = ("image_url", "input_image")
"""Kinds of content parts of a message: those that exclude length fields, and images."""
_MARKS = (b'"length_', b'"return_length_values"', b'"lenvm')
_DEFAULT_MAX_TOKENS = {COMPLETIONS: 16, GENERATE: 128}


def room_for(request: LengthRequest, path: str, context_length: int) -> int | None:
    """`max_tokens` of a request with a target that sets none, where the host's default would cut it short; lowered to
    what the prompt leaves when that is known (`admission.check_room`)."""
    default = _DEFAULT_MAX_TOKENS.get(path)
    if default is None or request.target is None:
        return None
    return max(default, 2 * request.target + 32) if request.scope == "all" else context_length


def _is_length_field(name: str) -> bool:
    return name.startswith(PREFIX) or name in FIELD_NAMES


def _take(fields: Fields) -> Fields:
    """Remove and return the length fields of a dict."""
    return {name: fields.pop(name) for name in list(fields) if _is_length_field(name)}


def _merge(outer: Fields, inner: Fields) -> Fields:
    """Fields given in two places.

    Raises:
        LengthFieldError: they differ.
    """
    for name in outer.keys() & inner.keys():
        if outer[name] != inner[name]:
            raise LengthFieldError(
                name, f"{name} is given twice, as {shown(outer[name])} and as {shown(inner[name])}; send one of them."
            )
    return {**outer, **inner}


def _into_custom_params(
    target: Fields, given: Fields, served: bool, path: str, context_length: int, thinks: bool
) -> bool:
    """Check the length fields of one request and put them where the host carries them.

    Args:
        target: the dict that holds the sampling parameters (the body itself for the OpenAI routes); changed in place.
        given: length fields found outside `custom_params`.

    Returns:
        Whether it carries length fields.
    """
    custom = target.get("custom_params")
    custom = dict(custom) if isinstance(custom, dict) else {}
    check_custom_params(custom)
    fields = _merge(given, _take(custom))
    request = parse_fields(fields, served)
    if request is None:
        return False
    check_scope(request, thinks)
    names = {
        CHAT: ("max_completion_tokens", "max_tokens"),
        COMPLETIONS: ("max_tokens",),
        GENERATE: ("max_new_tokens",),
    }[path]
    max_tokens = next((target[n] for n in names if target.get(n) is not None), None)
    if max_tokens is None and (room := room_for(request, path, context_length)) is not None:
        target[names[0]], custom[ROOM_KEY] = room, True
    minimum = target.get("min_new_tokens" if path == GENERATE else "min_tokens")
    request.check_against(
        max_tokens=max_tokens if isinstance(max_tokens, int) else None,
        min_tokens=minimum if isinstance(minimum, int) and minimum > 0 else None,
        ignore_eos=target.get("ignore_eos") is True,
    )
    if request.target is not None and request.mode != "at_most" and request.target >= context_length:
        raise LengthFieldError(
            "length_target",
            f"length_target {request.target} ({request.mode}) does not fit into the context of {context_length} "
            "tokens; lower it.",
        )
    beam_width = target.get("beam_width")
    check_companions(
        request,
        beam_width=beam_width if isinstance(beam_width, int) else None,
        stops_on_text=bool(target.get("stop") or target.get("stop_regex")),
        other={n: target.get(n) for n in UNSUPPORTED_COMPANIONS},
    )
    target["custom_params"] = {**custom, **{k: v for k, v in fields.items() if v is not None}}
    return True


def _parts(body: Fields) -> dict[str, bool]:
    """The kinds of content parts in a conversation's messages, as `check_companions` takes them."""
    messages = body.get("messages")
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return {str(part.get("type")): True for part in parts if isinstance(part, dict)}


def lift_fields(body: Any, path: str, served: bool, context_length: int = 1 << 62, thinks: bool = False,
                sees_images: bool = False) -> bool:  # fmt: skip
    """Check a request body's length fields and move them into `custom_params`, in place.

    Args:
        body: the parsed JSON body.
        path: one of CHAT, COMPLETIONS, GENERATE.
        served: whether the server has a length value model.
        context_length: of the server, in tokens.
        thinks: it knows the tags of the base model's thinking.
        sees_images: its value model reads images.

    Returns:
        Whether the request (or one of its batch) carries length fields.

    Raises:
        LengthFieldError: what the client must be told.
    """
    if not isinstance(body, dict):
        return False
    given = _take(body)
    if path != GENERATE:
        carries = _into_custom_params(body, given, served, path, context_length, thinks)
        if carries and path == CHAT:
            request = LengthRequest.parse(body["custom_params"])
            assert request is not None
            parts = _parts(body)
            check_companions(request, other={part: parts.get(part) for part in UNSUPPORTED_PARTS})
            check_images(request, [part for part in IMAGE_PARTS if part in parts], sees_images)
        return carries
    other = {n: body.get(n) for n in UNSUPPORTED_COMPANIONS}
    params = body.get("sampling_params")
    if params is None and given:
        params = body["sampling_params"] = {}
    found = False
    for one in params if isinstance(params, list) else [params]:
        if isinstance(one, dict):
            carries = _into_custom_params(one, _merge(given, _take(one)), served, path, context_length, thinks)
            if carries:
                request = LengthRequest.parse(one["custom_params"])
                assert request is not None
                check_companions(request, other=other)
                check_images(request, body.get("image_data"), sees_images)
            found = found or carries
    return found


class LengthFieldsMiddleware:
    """See the module's text.

    Attributes:
        served: whether the server has a length value model.
        context_length: of the server, in tokens.
        thinks: it knows the tags of the base model's thinking.
        sees_images: its value model reads images.
    """

    def __init__(
        self, app: Any, served: bool, context_length: int, thinks: bool = False, sees_images: bool = False
    ) -> None:
        self.app = app
        self.served = served
        self.context_length = context_length
        self.thinks = thinks
        self.sees_images = sees_images

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        path = scope.get("path", "").rstrip("/")
        known = path in (CHAT, COMPLETIONS, GENERATE)
        if (
            scope["type"] != "http"
            or scope.get("method") not in ("POST", "PUT")
            or not (known or path in UNSUPPORTED_PATHS)
        ):
            await self.app(scope, receive, send)
            return
        raw = await _read(receive)
        if raw is None:
            return
        try:
            if _may_name_fields(raw):
                changed, guided = self._rewrite(raw, path, known)
            else:
                changed, guided = raw, False
        except LengthFieldError as error:
            await _refuse(send, error)
            return
        except RecursionError:
            await _refuse(send, LengthFieldError("body", "the body is nested too deeply; send fewer levels."))
            return
        if changed is not raw:
            length = str(len(changed)).encode()
            headers = [(k, length if k == b"content-length" else v) for k, v in scope["headers"]]
            scope = {**scope, "headers": headers}
        replay = _Replay(changed, receive)
        if not guided:
            await self.app(scope, replay, send)
            return
        token = collected.set(Collected())
        try:
            await self.app(scope, replay, _Annotator(send, path))
        finally:
            collected.reset(token)

    def _rewrite(self, raw: bytes, path: str, known: bool) -> tuple[bytes, bool]:
        try:
            body = json.loads(raw)
        except ValueError:
            return raw, False  # the route answers broken JSON
        if not known:
            fields = [n for n in body if _is_length_field(n)] if isinstance(body, dict) else []
            if fields:
                raise LengthFieldError(
                    fields[0], f"{fields[0]} is not supported on {path}; use {CHAT}, {COMPLETIONS} or {GENERATE}."
                )
            return raw, False
        guided = lift_fields(body, path, self.served, self.context_length, self.thinks, self.sees_images)
        return (json.dumps(body).encode(), True) if guided else (raw, False)


def _may_name_fields(raw: bytes) -> bool:
    """Whether a body has to be parsed to know that it names no length field.

    JSON may spell any letter as an escape, and may come in UTF-16 or UTF-32; the routes read both.
    """
    return any(mark in raw for mark in _MARKS) or b"\\u00" in raw or b"\0" in raw[:4]


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if the client left."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _refuse(send: Send, error: LengthFieldError) -> None:
    payload = json.dumps(error_body(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(payload)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": payload})


def error_body(error: LengthFieldError) -> dict[str, Any]:
    """The OpenAI error shape."""
    return {"error": {"message": str(error), "type": "invalid_request_error", "param": error.param, "code": 400}}


class _Replay:
    """`receive` that gives the body again, then whatever comes after it (a disconnect)."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.body: bytes | None = body
        self.receive = receive

    async def __call__(self) -> Message:
        if self.body is None:
            return await self.receive()
        body, self.body = self.body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Annotator:
    """`send` that writes the collected reports into OpenAI-shaped responses, JSON and event streams alike.

    `/generate` needs none of it: its outputs carry the object already.
    """

    def __init__(self, send: Send, path: str) -> None:
        self.send = send
        self.passes = path == GENERATE
        self.start: Message | None = None
        self.stream = False
        self.pending = b""

    async def __call__(self, message: Message) -> None:
        if self.passes:
            await self.send(message)
        elif message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self.stream = kind.startswith(b"text/event-stream")
            self.passes = not self.stream and not (message["status"] == 200 and kind.startswith(b"application/json"))
            if self.stream or self.passes:
                await self.send(message)
            else:
                self.start = message
        elif self.stream:
            await self._event(message)
        else:
            await self._json(message)

    async def _json(self, message: Message) -> None:
        self.pending += message.get("body", b"")
        if message.get("more_body", False):
            return
        assert self.start is not None
        body = json.loads(self.pending)
        annotate(body, collected.get() or Collected())
        payload = json.dumps(body, ensure_ascii=False).encode()
        length = str(len(payload)).encode()
        headers = [(k, length if k == b"content-length" else v) for k, v in self.start["headers"]]
        await self.send({**self.start, "headers": headers})
        await self.send({"type": "http.response.body", "body": payload})

    async def _event(self, message: Message) -> None:
        self.pending += message.get("body", b"")
        more = message.get("more_body", False)
        *events, self.pending = self.pending.split(b"\n\n")
        if not more and self.pending:
            events, self.pending = [*events, self.pending], b""
        out = b"".join(_annotate_event(event) + b"\n\n" for event in events)
        if out or not more:
            await self.send({**message, "body": out})


def _annotate_event(event: bytes) -> bytes:
    head, mark, payload = event.partition(b"data: ")
    if not mark or b'"finish_reason"' not in payload or head.strip():
        return event
    try:
        body = json.loads(payload)
    except ValueError:
        return event
    if annotate(body, collected.get() or Collected()):
        return b"data: " + json.dumps(body, ensure_ascii=False).encode()
    return event


def annotate(body: Any, said: Collected) -> bool:
    """Add `lenvm` to each finished choice, and to the top level (that of the lowest finished choice); and the waiting
    `lenvm_delta` to a streamed choice that brings text or ends.

    Returns:
        Whether anything was added.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    added = False
    for choice in choices or ():
        index, finished = choice.get("index", 0), choice.get("finish_reason") is not None
        if index in said.deltas and (finished or _brings_text(choice)):
            choice[DELTA_KEY] = said.deltas.pop(index)
            added = True
        report = said.reports.get(index)
        if report is not None and finished:
            choice[REPORT_KEY] = report
            body.setdefault(REPORT_KEY, report)
            added = True
    return added


def _brings_text(choice: Fields) -> bool:
    """Whether a streamed choice is more than the announcement of a role."""
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or any(delta.get(n) for n in ("content", "reasoning_content", "tool_calls")))
