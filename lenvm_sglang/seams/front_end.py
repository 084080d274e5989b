"""Hooks of the front end: what requests may ask for, and what they are told."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from lenvm_sglang import admission, responses
from lenvm_sglang.seams.this_process import process


def verify_sampling_params(result: None, self: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER SamplingParams.verify: the last gate before the scheduler, whatever road a request took."""
    admission.check_sampling_params(self, process.served)


def validate_request(original: Callable[..., None], self: Any, obj: Any, input_ids: Any) -> None:
    """AROUND TokenizerManager._validate_one_request: what the host would let through to its end, and a target against
    the prompt's tokens."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if process.served and isinstance(obj, GenerateReqInput) and input_ids is not None:
        if obj.input_embeds is None:
            admission.check_token_ids(input_ids, self.model_config.vocab_size)
        admission.check_stop_regex(obj.sampling_params.get("stop_regex"))
        thinks = process.think_tags is not None
        obj.sampling_params = admission.check_room(obj.sampling_params, len(input_ids), process.longest, thinks)
    original(self, obj, input_ids)


async def generate_request(
    original: Callable[..., Any], self: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """AROUND TokenizerManager.generate_request: fields of Engine calls in, reports out."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    if isinstance(obj, GenerateReqInput):
        if process.served:
            prompts = obj.input_ids if obj.text is None else obj.text
            obj.sampling_params = admission.check_sampling_list(obj.sampling_params, prompts)
        admission.lift_engine_fields(obj, process.served, process.sees_images)
    async with aclosing(original(self, obj, request)) as outputs:
        async for out in outputs:
            for position, one in enumerate(out if isinstance(out, list) else [out]):
                if "meta_info" in one:
                    responses.publish(one, position)
            yield out


def update_meta_info(original: Callable[..., Any], self: Any, meta_info: dict[str, Any], state: Any,
                     customized_info: dict[str, Any], index: int, finish_reason: Any) -> None:  # fmt: skip
    """AROUND TokenizerManager.update_request_meta_info: our entry of the metadata."""
    rest, reported = responses.split_metadata(customized_info, index)
    if rest:
        original(self, meta_info, state, rest, index, finish_reason)
    progress = None if reported is None else responses.accumulate(state, reported)
    if progress is None:
        return
    responses.annotate_metadata(meta_info, progress, finish_reason is not None)
    if process.metrics is not None and finish_reason is not None and progress.sequence is None:
        process.metrics.finished(
            progress.request, meta_info["completion_tokens"], finish_reason["type"], progress.thought
        )


def send_one_request(self: Any, tokenized: Any) -> None:
    """BEFORE TokenizerManager._send_one_request: number the n answers of a request, mark those of `/lenvm/values`."""
    admission.number_samples(tokenized)
    admission.mark_sequence(tokenized)


def chat_prompt(app: Any, chat: Any) -> tuple[list[int] | str, Any]:
    """The prompt that the host makes of a ChatCompletionRequest: token ids, or text; and its images, if any.

    Raises:
        ValueError: the host refuses the conversation.
    """
    serving = app.state.openai_serving_chat
    problem = serving._validate_request(chat)
    if problem:
        raise ValueError(problem)
    try:
        internal, _ = serving._convert_to_internal_request(chat)
    except Exception as error:  # a template may raise anything over what a client wrote
        raise ValueError(f"the chat template refuses this conversation ({type(error).__name__}: {error}).") from error
    for kind in ("video", "audio"):
        if getattr(internal, f"{kind}_data"):
            raise ValueError(f"the length value model does not read {kind} yet; leave it out.")
    return internal.input_ids if internal.input_ids is not None else internal.text, internal.image_data or None
