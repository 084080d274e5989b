"""Hooks of a scheduler at work: admission, the rows of a batch, what follows a forward, and sampling."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from lenvm_sglang import admission
from lenvm_sglang.seams.this_process import process

if TYPE_CHECKING:
    from lenvm_sglang.rows import LengthRows


def admit_request(result: None, self: Any, req: Any) -> None:
    """AFTER Scheduler.init_req_max_new_tokens, which every new request passes before it is queued: state and radix
    namespace of those with length fields."""
    stops = set(self.model_config.hf_eos_token_id or ())
    if self.tokenizer is not None:
        stops.add(self.tokenizer.eos_token_id)
        stops |= set(getattr(self.tokenizer, "additional_stop_token_ids", None) or ())
    own_prefixes = process.worker is None or process.worker.own_prefixes
    stop_ids = frozenset(t for t in stops if t is not None)
    admission.admit(req, process.served, stop_ids, own_prefixes, process.think_tags)


def max_prefix_len(result: int, self: Any, *args: Any, **kwargs: Any) -> int:
    """AFTER Req._compute_max_prefix_len: states that are wanted have to be read."""
    return admission.reusable_prefix(self, result)


def forward_batch(result: Any, cls: type, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ForwardBatch.init_new: which rows carry length fields."""
    if process.worker is None:
        return
    if process.worker.reads_base:
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode

        result.capture_hidden_mode = max(result.capture_hidden_mode, CaptureHiddenMode.LAST)
    decode = batch.forward_mode.is_decode()
    if decode and process.decoded is not None and process.decoded[0] == batch.reqs:
        rows = process.decoded[1]
    else:
        rows = length_rows(batch, decode)
        # a scope reads the tokens of every step
        lasting = decode and (rows is None or all(state.scope is None for state in rows.states))
        process.decoded = (list(batch.reqs), rows) if lasting else None
    index = [] if rows is None else rows.index
    result.lenvm_requests, result.lenvm_rows = [batch.reqs[i] for i in index], rows
    result.lenvm_seen = None
    if not decode and process.worker.sees_images and any(result.mm_inputs[i] is not None for i in index):
        from lenvm_sglang.rows import Seen

        result.lenvm_seen = Seen(result.input_ids.clone(), list(result.mm_inputs))


def length_rows(batch: Any, decode: bool) -> LengthRows | None:
    """The rows of a batch that carry length fields."""
    from lenvm_sglang.rows import LengthRows

    index: list[int] = []
    states, draws, steered, moved = [], [], [], []
    lengths = batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu
    for i, req in enumerate(batch.reqs):
        state = admission.state_of(req)
        if state is None or state.failed:
            continue
        if not decode:
            state.prompt_tokens = len(req.origin_input_ids)  # the host may have truncated it since admission
            if req.multimodal_inputs is not None:
                state.rotary_shift = int(req.multimodal_inputs.mrope_position_delta.item())
        if state.scope is not None and state.scope.read(req.output_ids) and decode:
            moved.append(len(index))
        index.append(i)
        states.append(state)
        steered.append(
            state.request.steers if state.scope is None else state.steers_at(int(lengths[i]) - state.prompt_tokens)
        )
        whole = decode or int(lengths[i]) == len(req.full_untruncated_fill_ids)
        draws.append(whole and req.sampling_params.max_new_tokens != 0 and state.sequence_from is None)
    return LengthRows(index, states, draws, steered, moved) if index else None


def model_forward(result: Any, self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ModelRunner.forward: value KV of what the base model just read, and the prompt boundary's prediction."""
    rows = getattr(forward_batch, "lenvm_rows", None)
    processor = getattr(self, "lenvm_processor", None)
    if rows is None or processor is None:
        return
    from lenvm_sglang import isolation

    forward_batch.lenvm_read, failed = isolation.follow(processor, forward_batch, rows, result.logits_output)
    fail_requests(forward_batch, processor, failed)


def model_sample(original: Callable[..., Any], self: Any, logits_output: Any, forward_batch: Any) -> Any:
    """AROUND ModelRunner.sample: the frame of one sampling step."""
    rows = getattr(forward_batch, "lenvm_rows", None)
    processor = getattr(self, "lenvm_processor", None)
    if rows is None or processor is None:
        return original(self, logits_output, forward_batch)
    from sglang.srt.layers.sampler import SGLANG_RETURN_ORIGINAL_LOGPROB
    from sglang.srt.managers.auxiliary_output import append_auxiliary_output

    from lenvm_sglang import isolation

    step = processor.begin(
        forward_batch, rows, logits_output.next_token_logits, scale_logprobs=not SGLANG_RETURN_ORIGINAL_LOGPROB
    )
    process.step = step
    greedy = forward_batch.sampling_info.is_all_greedy
    try:
        token_ids = original(self, logits_output, forward_batch)
    finally:
        process.step = None
        forward_batch.sampling_info.is_all_greedy = greedy
    if step.steered is not None:
        raise RuntimeError("lenvm: the host's sampler did not pass through Sampler._preprocess_logits.")
    fail_requests(forward_batch, processor, isolation.watch(step, token_ids))
    for output in (*forward_batch.lenvm_read, *step.outputs):
        current = logits_output.auxiliary_device_output
        logits_output.auxiliary_device_output = append_auxiliary_output(current, output)
    return token_ids


def preprocess_logits(result: Any, self: Any, logits: Any, sampling_info: Any) -> None:
    """AFTER Sampler._preprocess_logits: steer, if this is the tensor that is sampled from and not a copy.

    Where every row is one-hot then and the host's sampler goes on (for log-probabilities, say), it takes the arg max
    instead of sorting the vocabulary for a draw."""
    step = process.step
    if step is not None and step.logits is logits:
        from lenvm_sglang import isolation

        fail_requests(step.batch, step.processor, isolation.steer(step))
        if step.all_drawn:
            sampling_info.is_all_greedy = True  # until the end of `model_sample`


def sampler_forward(original: Callable[..., Any], self: Any, logits_output: Any, sampling_info: Any,
                    return_logprob: bool, *args: Any, **kwargs: Any) -> Any:  # fmt: skip
    """AROUND Sampler.forward: where every token is drawn here and nothing else is asked of the host's sampler, it is
    passed by, and no row of the logits is written.

    What a new host's sampler does beside drawing has to be looked at here: it is left out."""
    step, logits = process.step, logits_output.next_token_logits
    passed = (
        step is not None
        and step.logits is logits
        and step.all_steered
        and not return_logprob
        and not sampling_info.has_custom_logit_processor  # would act twice if one of the rows fails
        and sampling_info.sampling_mask_batch_indices is None
        and kwargs.get("logprob_logits") is None
    )
    if passed:
        step.one_hot = False
        self._preprocess_logits(logits, sampling_info)
        if step.all_drawn:
            self._sync_token_ids_across_tp(step.drawn.token_ids, sampling_info)
            return step.drawn.token_ids
        step.write_drawn()
    return original(self, logits_output, sampling_info, return_logprob, *args, **kwargs)


def fail_requests(forward_batch: Any, processor: Any, failed: list[tuple[Any, Exception]]) -> None:
    """Requests for which the value model raised end with an error, and their value KV is never reused."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    requests = (
        {
            id(state): req
            for state, req in zip(forward_batch.lenvm_rows.states, forward_batch.lenvm_requests, strict=True)
        }
        if failed
        else {}
    )
    if failed:
        process.decoded, forward_batch.lenvm_rows = None, forward_batch.lenvm_rows.anew()
    for state, error in failed:
        req = requests[id(state)]
        state.failed = req.skip_radix_cache_insert = True
        message = f"the length value model failed on this request ({type(error).__name__}: {error})."
        req.to_finish = FINISH_ABORT(message, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
    if failed and processor.metrics is not None:
        processor.metrics.failures.inc(len(failed))


def compute_logprobs(self: Any, logprobs: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE OutputLogprobProcessor.compute_logprobs: the base model's log-probabilities in steered rows."""
    step = process.step
    if step is not None and step.drawn is not None and step.drawn.base_logprobs is not None:
        logprobs[step.drawn.rows] = step.drawn.base_logprobs.to(logprobs.dtype)
