"""Admitting requests with length fields: checks in the front end, one state object in the scheduler."""

from __future__ import annotations

import copy
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from lenvm.request import LengthFieldError, LengthRequest
from lenvm_sglang.scope import Scope, ThinkTags
from lenvm_sglang.state import RequestState, draw_seed

logger = logging.getLogger(__name__)

SAMPLE_KEY = "lenvm_sample"
"""Entry of `custom_params` that tells the `n` answers of one request apart; ours, refused from clients."""
SEQUENCE_KEY = "lenvm_sequence_from"
"""Entry of `custom_params` of a request behind `POST /lenvm/values`; ours, refused from clients."""
ROOM_KEY = "lenvm_room"
"""Entry of `custom_params` that says that the plug-in chose `max_new_tokens`, so that it may be lowered to what the
prompt leaves; ours, refused from clients."""
sequence_from: ContextVar[int | None] = ContextVar("lenvm_sequence_from", default=None)
"""In a task of `POST /lenvm/values`: the position of the last prompt token."""
NAMESPACE = f"lenvm-{secrets.token_hex(16)}"
"""Radix-tree namespace of requests with length fields: a prefix in it always has value KV. Random, so that no client
can name it in `extra_key`."""
_TOP_K_ALL = 1 << 30


def parse_fields(fields: Mapping[str, Any], served: bool) -> LengthRequest | None:
    """The length fields among `fields`.

    Args:
        fields: a request body, sampling parameters or custom parameters.
        served: whether this server has a length value model.

    Raises:
        LengthFieldError: a bad field, or any length field on a server without a length value model.
    """
    request = LengthRequest.parse(fields)
    if request is not None and not served:
        name = next(n for n in fields if n.startswith("length_") or n == "return_length_values")
        raise LengthFieldError(
            name, f"{name} needs a length value model, and this server has none; start it with --lenvm-model."
        )
    return request


def check_token_ids(input_ids: Sequence[int], vocabulary: int) -> None:
    """Refuse a prompt without tokens, or with token ids that the base model does not have: both end the host's
    scheduler, and every other request with it.

    Raises:
        ValueError: naming the id, which the host answers with 400.
    """
    if len(input_ids) == 0:
        raise ValueError("The prompt is empty; it needs at least one token.")
    if min(input_ids) >= 0 and max(input_ids) < vocabulary:
        return
    wrong = next(token for token in input_ids if not 0 <= token < vocabulary)
    raise ValueError(f"The prompt has token id {wrong}; allowed are 0 to {vocabulary - 1}, the model's vocabulary.")


def check_stop_regex(stop_regex: str | Sequence[str] | None) -> None:
    """Refuse a regular expression that does not compile, which the host would answer with a 500.

    Raises:
        ValueError: naming it, which the host answers with 400.
    """
    for pattern in [stop_regex] if isinstance(stop_regex, str) else stop_regex or ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"stop_regex {pattern!r} is not a regular expression: {error}.") from None


def check_sampling_list(sampling_params: Any, prompts: Any) -> Any:
    """Refuse sampling parameters that do not fit the prompts, or ask for a number of answers that is none: the host
    would answer with a 500.

    Args:
        sampling_params: of a host request: None, one dict for all prompts, or a list with one for each.
        prompts: its text or token ids: one prompt, or a list of them. None where it has neither.

    Returns:
        `sampling_params`; of a list of one for a single prompt what is in it.

    Raises:
        ValueError: naming the number, which the host answers with 400.
    """
    every = sampling_params if isinstance(sampling_params, list) else [sampling_params]
    if isinstance(sampling_params, list) and prompts is not None:
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        wanted = 1 if single else len(prompts)
        if len(every) != wanted:
            raise ValueError(
                f"sampling_params is a list of {len(every)} for {wanted} prompt{'s'[: wanted != 1]}; give one object "
                "for all prompts, or a list with one for each."
            )
        if single:
            sampling_params = every[0]
    for one in every:
        n = one.get("n", 1) if isinstance(one, dict) else 1
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"n must be a whole number of answers, at least 1, got {n!r}.")
    return sampling_params


def check_custom_params(custom_params: Mapping[str, Any] | None) -> None:
    """Refuse what only the plug-in may put there.

    Raises:
        LengthFieldError: naming the key.
    """
    for key in custom_params or ():
        if key.startswith("lenvm"):
            raise LengthFieldError(key, f"custom_params must not contain {key!r}; send the length_* fields instead.")


def check_room(params: dict[str, Any], prompt_tokens: int, longest: int, thinks: bool) -> dict[str, Any]:
    """Check a target against the prompt, once its tokens are known.

    Args:
        params: the request's sampling parameters.
        prompt_tokens: of its prompt.
        longest: most tokens of prompt and completion together that the server has room for.
        thinks: the server knows the tags of the base model's thinking.

    Returns:
        `params`, or a copy whose `max_new_tokens` is what the prompt leaves, if it is the plug-in's own choice.

    Raises:
        LengthFieldError: a target that must be reached and cannot be.
    """
    custom = params.get("custom_params")
    if not isinstance(custom, dict):
        return params
    request = LengthRequest.parse(custom)
    if request is None or request.target is None:
        return params
    check_scope(request, thinks)
    room = longest - prompt_tokens
    if request.mode != "at_most" and request.target > room:
        raise LengthFieldError(
            "length_target",
            f"length_target {request.target} ({request.mode}) cannot be reached: the prompt has {prompt_tokens} tokens "
            f"and the server has room for {longest} with the answer; lower length_target or shorten the prompt.",
        )
    if not custom.get(ROOM_KEY):
        return params
    rest = {key: value for key, value in custom.items() if key != ROOM_KEY}
    return {**params, "custom_params": rest, "max_new_tokens": min(params["max_new_tokens"], max(room, 1))}


def check_scope(request: LengthRequest, thinks: bool) -> None:
    """Refuse a scope that this server cannot tell.

    Raises:
        LengthFieldError: naming it.
    """
    if request.scope != "all" and not thinks:
        raise LengthFieldError(
            "length_scope",
            f"length_scope {request.scope!r} needs a server that knows where thinking ends; start it with "
            "--reasoning-parser, for a model whose end tag is one token, or drop length_scope.",
        )


def check_sampling_params(params: Any, served: bool) -> None:
    """Check the length fields in the host's SamplingParams against each other and against the rest of them.

    This is the last gate of every road into the scheduler: HTTP, `custom_params`, and `Engine`.

    Raises:
        LengthFieldError: a ValueError, which the host answers with 400.
    """
    custom = params.custom_params
    if not isinstance(custom, dict):
        return
    check_custom_params(custom)
    request = parse_fields(custom, served)
    if request is None:
        return
    request.check_against(
        max_tokens=params.max_new_tokens, min_tokens=params.min_new_tokens or None, ignore_eos=params.ignore_eos
    )
    check_companions(
        request,
        beam_width=params.beam_width,
        stops_on_text=bool(params.stop_strs or params.stop or params.stop_regex_strs or params.stop_regex),
    )


def check_companions(request: LengthRequest, *, beam_width: int | None = None, stops_on_text: bool = False,
                     other: Mapping[str, Any] | None = None) -> None:  # fmt: skip
    """Refuse what cannot go together with length fields.

    Args:
        beam_width: of the request.
        stops_on_text: it has `stop` strings or regular expressions.
        other: request fields by name that must be absent.

    Raises:
        LengthFieldError: naming both.
    """
    name = steering_field(request)
    if beam_width is not None and beam_width > 1:
        raise LengthFieldError(name, f"{name} does not work with beam search; drop beam_width {beam_width}.")
    if request.strict and stops_on_text:
        raise LengthFieldError(
            "length_strict",
            "length_strict cannot promise a length beside stop strings, which end an answer at any "
            "token; drop stop or length_strict.",
        )
    for field, value in (other or {}).items():
        if value:
            raise LengthFieldError(name, f"{name} does not work with {field} yet; drop one of them.")


def steering_field(request: LengthRequest) -> str:
    """The field that a refusal names."""
    if not request.steers:
        return "return_length_values"
    return "length_bias" if request.target is None else "length_target"


UNSUPPORTED_COMPANIONS = (
    "session_params",
    "session_id",
    "input_embeds",
    "audio_data",
    "video_data",
    "return_sampling_mask",
    "positional_embed_overrides",
)
"""Fields of `/generate` and of the host's request object that exclude length fields."""


def check_images(request: LengthRequest, images: Any, sees_images: bool) -> None:
    """Refuse images that the value model cannot read.

    Args:
        images: as the host takes them: None, one, a list, or a list of lists; a dict holds what another process made
            of an image, for the base model alone.
        sees_images: the value model has a vision tower.

    Raises:
        LengthFieldError: saying what to do.
    """
    if isinstance(images, list):
        for one in images:
            check_images(request, one, sees_images)
        return
    if images is None:
        return
    name = steering_field(request)
    if not sees_images:
        raise LengthFieldError(
            name,
            f"{name} does not work with images on this server, whose length value model reads text only; drop the "
            "images, or serve a vision-language length value model.",
        )
    if isinstance(images, dict) and "format" in images:
        raise LengthFieldError(
            name, f"{name} does not work with image features of format {images['format']!r}; send the image itself."
        )


def lift_engine_fields(obj: Any, served: bool, sees_images: bool = False) -> None:
    """Move length fields found among a host request's sampling parameters (as `Engine.generate` takes them) into
    `custom_params`, and refuse what cannot go with them. Requests that came over HTTP have been through this.

    Raises:
        LengthFieldError: a ValueError.
    """
    params = obj.sampling_params
    for one in params if isinstance(params, list) else [params]:
        if not isinstance(one, dict):
            continue
        fields = {n: one.pop(n) for n in list(one) if n.startswith("length_") or n == "return_length_values"}
        if fields:
            one["custom_params"] = {**(one.get("custom_params") or {}), **fields}
        custom = one.get("custom_params")
        request = parse_fields(custom, served) if isinstance(custom, dict) else None
        if request is not None:
            check_companions(request, other={n: getattr(obj, n, None) for n in UNSUPPORTED_COMPANIONS})
            check_images(request, getattr(obj, "image_data", None), sees_images)


def state_of(req: Any) -> RequestState | None:
    """The length state of a host request."""
    return getattr(req, "lenvm_state", None)


def state_now(req: Any) -> RequestState | None:
    """The same, after a look at the tokens committed since."""
    state = state_of(req)
    if state is not None and state.scope is not None:
        state.scope.read(req.output_ids)
    return state


def admit(
    req: Any,
    served: bool,
    default_stop_token_ids: frozenset[int],
    own_prefixes: bool = True,
    tags: ThinkTags | None = None,
) -> None:
    """Give a new host request its state and its radix namespace, if it carries length fields.

    The front end has checked the fields; if something is wrong all the same, the request is aborted with its sentence.

    Args:
        req: the host's request.
        served: whether this scheduler has a value worker.
        default_stop_token_ids: stop tokens that every request has.
        own_prefixes: whether it reuses cached prefixes of such requests only (`NAMESPACE`).
        tags: of the base model's thinking, if it is known.
    """
    params = req.sampling_params
    custom = params.custom_params
    if not isinstance(custom, dict):
        return
    try:
        request = parse_fields(custom, served)
        if request is not None:
            check_scope(request, tags is not None)
    except LengthFieldError as error:
        req.set_finish_with_abort(str(error))
        return
    if request is None:
        return
    greedy = params.top_k <= 1 and params.temperature == 1.0
    stops = set() if params.ignore_eos else default_stop_token_ids | set(params.stop_token_ids or ())
    req.lenvm_state = RequestState(
        request=request,
        prompt_tokens=len(req.origin_input_ids),
        seed=draw_seed(params.sampling_seed, int(custom.get(SAMPLE_KEY, 0)), req.rid),
        stop_token_ids=tuple(sorted(stops)),
        temperature=params.temperature,
        top_k=_TOP_K_ALL if greedy else max(params.top_k, 1),
        top_p=params.top_p,
        min_p=params.min_p,
        greedy=greedy,
    )
    if request.scope != "all" and tags is not None:
        reasoning = bool(getattr(req, "require_reasoning", False))
        req.lenvm_state.scope = Scope.begin(
            request.scope, tags, req.origin_input_ids, default_stop_token_ids, reasoning
        )
    begin = custom.get(SEQUENCE_KEY)
    if begin is not None:
        behind = enumerate(req.origin_input_ids[begin + 1 :], start=begin + 1)
        req.lenvm_state.sequence_from = begin
        req.lenvm_state.sequence_stops = frozenset(position for position, token in behind if token in stops)
    if own_prefixes:
        req.extra_key = NAMESPACE if req.extra_key is None else f"{NAMESPACE}/{req.extra_key}"


def reusable_prefix(req: Any, limit: int) -> int:
    """How much of a cached prefix a request may reuse: one whose every state is wanted has to read those states.

    Args:
        req: the host's request.
        limit: the host's own limit, in tokens.
    """
    state = state_of(req)
    return limit if state is None or state.sequence_from is None else min(limit, state.sequence_from)


def mark_sequence(tokenized: Any) -> None:
    """Tell the scheduler that a request wants every state (after the gates that refuse this key from clients)."""
    begin = sequence_from.get()
    if begin is not None:
        tokenized.sampling_params.custom_params[SEQUENCE_KEY] = begin


def number_samples(tokenized: Any) -> None:
    """Tell the `n` answers of a request apart, so that one seed gives n different answers.

    The host sends the n copies one after the other with the same SamplingParams; the first of them (max_new_tokens 0)
    only warms the prefix cache.
    """
    params: Any = getattr(tokenized, "sampling_params", None)
    custom = getattr(params, "custom_params", None)
    if not isinstance(custom, dict) or params.sampling_seed is None or params.max_new_tokens == 0:
        return
    if LengthRequest.parse(custom) is None:
        return
    sample = custom.get(SAMPLE_KEY, -1) + 1
    custom[SAMPLE_KEY] = sample
    params = copy.copy(params)
    params.custom_params = {**custom}
    tokenized.sampling_params = params
