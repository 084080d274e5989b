"""Every place where the plug-in takes hold of SGLang: the one module to read when the host moves.

Each hook is a thin function that reads what it needs from the host's objects and calls a module of ours. `install`
checks the host's version and that every target exists; `verify` checks, when the scheduler is up, that every hook took
(SGLang itself only logs a hook that fails). The module is long because it is the only one: what a host upgrade can
break is found here and nowhere else. What differs between the supported versions is in `lenvm_sglang.versions`.
"""

from __future__ import annotations

import logging
import pkgutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from lenvm_sglang import admission, responses, settings, versions
from lenvm_sglang.metrics import RequestMetrics, request_metrics, step_metrics
from lenvm_sglang.scope import ThinkTags
from lenvm_sglang.settings import Settings, StartError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lenvm_sglang.rows import LengthRows

Hook = tuple[str, str, Callable[..., Any]]
"""(target, kind, hook)."""


class SeamError(RuntimeError):
    """The host is not one this plug-in knows; the message says which it is."""


@dataclass
class Process:
    """What this process serves; one object for each launcher or scheduler process.

    Attributes:
        settings: of the server; None without a LenVM.
        command_line: the launcher came from the command line, where a refusal is one sentence and an exit status.
        worker: the value worker of a scheduler process.
        step: the sampling step under way in a scheduler process.
        decoded: the host's requests in its last decode step and their rows with length fields, which are the same in
            the next one if the requests are.
        metrics: of the front end's process, with `--enable-metrics`.
        longest: in a front end's process, most tokens of prompt and completion together.
        sees_images: in a front end's process, the value model reads the images of a prompt.
        think_tags: of the base model, where a reasoning parser names them.
        hooks: those installed in this process; None before that.
    """

    settings: Settings | None = None
    command_line: bool = False
    worker: Any = None
    step: Any = None
    decoded: tuple[list[Any], LengthRows | None] | None = None
    metrics: RequestMetrics | None = None
    longest: int = 0
    sees_images: bool = False
    think_tags: ThinkTags | None = None
    hooks: tuple[Hook, ...] | None = None

    @property
    def served(self) -> bool:
        return self.settings is not None


process = Process()


# ----- launcher -----------------------------------------------------------------------------------------------------


def add_cli_args(result: None, parser: Any) -> None:
    """AFTER ServerArgs.add_cli_args: our flags."""
    settings.add_flags(parser)


def from_cli_args(result: Any, cls: type, args: Any) -> None:
    """AFTER ServerArgs.from_cli_args: our settings ride on the result."""
    process.command_line = True
    try:
        ours = settings.settings_from(vars(args))
        if ours is not None:
            verify()
    except (StartError, SeamError) as error:
        raise SystemExit(f"lenvm: {error}") from None
    settings.attach(result, ours)


def launch_subprocesses(original: Callable[..., Any], cls: type, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND Engine._launch_subprocesses: every reason not to start, before anything is spawned."""
    process.settings = settings.settings_of(server_args)
    if process.settings is not None:
        try:
            verify()
            check_start(server_args, process.settings)
        except (StartError, SeamError) as error:
            if process.command_line:
                raise SystemExit(f"lenvm: {error}") from None
            raise
    started = original(cls, server_args, *args, **kwargs)
    for part in started:
        for info in getattr(part, "scheduler_infos", None) or ():
            if (ours := info.get("lenvm")) is not None:
                process.longest = ours["max_request_tokens"]
                process.sees_images = ours["images"]
                process.think_tags = ours["think_tags"] and ThinkTags(*ours["think_tags"])
    return started


def check_start(server_args: Any, ours: Settings) -> None:
    """Refuse a start with unsupported settings or an unfit checkpoint.

    Raises:
        StartError: saying why.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.environ import envs

    from lenvm_sglang.model import check_architecture, check_vision
    from lenvm_sglang.worker import architecture_of

    server_args.resolve_once()
    resolved = resolving_view(server_args)
    settings.refuse_settings(resolved, versions.host().refusals)
    if envs.SGLANG_RUST_SERVER.get():
        raise StartError("--lenvm-model does not work with SGLANG_RUST_SERVER yet; unset it.")
    base = ModelConfig.from_server_args(server_args)
    tokenizer = resolved.tokenizer_path or resolved.model_path
    if base.is_multimodal and settings.looks_ahead(ours):
        raise StartError("a lookahead head is served beside text models only; serve one, or a LenVM without it.")
    if settings.is_attached(ours):
        settings.refuse_adapters(resolved)
        settings.check_attached(ours, tokenizer, resolved.model_path)
        return
    settings.check_checkpoint(ours, tokenizer, base.context_len)
    architecture = architecture_of(ours.model)
    check_architecture(architecture)
    check_vision(ours.model, architecture, base.hf_config, base.is_multimodal)


def setup_http(original: Callable[..., Any], server_args: Any, tokenizer_manager: Any, template_manager: Any,
               port_args: Any, scheduler_infos: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:  # fmt: skip
    """AROUND http_server._setup_and_run_http_server: middleware and endpoints."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.runtime_context import get_observability
    from starlette.middleware import Middleware

    from lenvm_sglang import endpoints, openapi
    from lenvm_sglang.middleware import LengthFieldsMiddleware

    info = scheduler_infos[0].get("lenvm")
    if process.served and info is None:
        raise SystemExit("lenvm: the scheduler came up without the length value model; its log says why.")
    context_length = tokenizer_manager.model_config.context_len
    # innermost: after the host has authenticated the request and decompressed its body
    http_server.app.user_middleware.append(
        Middleware(
            LengthFieldsMiddleware,
            served=process.served,
            context_length=context_length,
            thinks=process.think_tags is not None,
            sees_images=process.sees_images,
        )
    )
    if process.served:
        openapi.extend(http_server.app)
        if get_observability().enable_metrics:
            process.metrics = request_metrics()
    host = endpoints.Host(
        app=http_server.app,
        tokenizer_manager=tokenizer_manager,
        chat_prompt=chat_prompt,
        vocabulary=tokenizer_manager.model_config.vocab_size,
        context_length=context_length,
    )
    endpoints.mount(host, info)
    return original(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, *args, **kwargs)


def build_server_args(**kwargs: Any) -> Any:
    """`Engine.server_args_class`, the host's own place for overriding: also takes lenvm_model and its options."""
    from sglang.srt.server_args import ServerArgs

    names = ("lenvm_model", *(f"lenvm_{option}" for option in settings.OPTIONS))
    ours = settings.settings_from({name: kwargs.pop(name, None) for name in names})
    server_args = ServerArgs(**kwargs)
    settings.attach(server_args, ours)
    return server_args


# ----- front end ----------------------------------------------------------------------------------------------------


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


# ----- scheduler: building ------------------------------------------------------------------------------------------


def load_value_model(result: None, self: Any) -> None:
    """AFTER Scheduler.maybe_init_draft_worker: the value model, before the base's KV pool is sized."""
    process.settings = settings.settings_of(self.server_args)
    if process.settings is not None:
        from lenvm_sglang.lookahead import make_worker

        process.worker = make_worker(self, process.settings)


def add_cell_size(result: int, self: Any, kvc: Any, num_layers: int) -> int | None:
    """AFTER DefaultPoolConfigurator._compute_cell_size: the value KV of a token."""
    if process.worker is None or kvc.is_draft_worker:
        return None
    return result + process.worker.bytes_per_token()


def leave_scratch(original: Callable[..., Any], self: Any, available_bytes: int, page_size: int) -> Any:
    """AROUND DefaultPoolConfigurator.calculate_pool_sizes: the value KV of the candidates comes out of the budget."""
    from sglang.srt.runtime_context import get_schedule

    if process.worker is not None:
        available_bytes -= process.worker.scratch_bytes(get_schedule().max_running_requests)
    return original(self, available_bytes, page_size)


def allocate_pools(result: None, self: Any) -> None:
    """AFTER Scheduler.init_memory_pools."""
    if process.worker is not None:
        process.worker.allocate()


def build_backends(result: None, self: Any) -> None:
    """AFTER Scheduler.init_all_attention_backends: attention, and the steering object on the base's runner."""
    if process.worker is not None:
        from sglang.srt.runtime_context import get_observability, get_parallel

        from lenvm_sglang.processor import LengthValueLogitProcessor

        process.worker.build_backends()
        # the ranks of a tensor-parallel group all do the same: one of them counts
        counts = get_observability().enable_metrics and get_parallel().tp_rank == 0
        self.tp_worker.model_runner.lenvm_processor = LengthValueLogitProcessor(
            process.worker, step_metrics() if counts else None
        )


def warm_up(result: None, self: Any) -> None:
    """AFTER Scheduler.init_all_cuda_graphs: the candidates' forward, and its own."""
    if process.worker is not None:
        process.worker.warm_up()


def output_streamer_class(result: type, self: Any) -> type | None:
    """AFTER Scheduler.get_output_streamer_class: one that reports predicted lengths."""
    if process.worker is None:
        return None
    from lenvm_sglang.outputs import reporting_streamer

    return reporting_streamer(result, admission.state_now)


def init_info(result: dict[str, Any], self: Any) -> None:
    """AFTER Scheduler.get_init_info, the last thing before the scheduler reports ready: the self-check."""
    verify()
    if process.settings is not None:
        if process.worker is None:
            raise StartError("the length value model was not loaded, although --lenvm-model was given.")
        process.think_tags = think_tags(self)
        result["lenvm"] = {
            **process.worker.info(),
            "max_request_tokens": self.max_req_len - 1,
            "think_tags": process.think_tags and list(process.think_tags),
        }


def think_tags(scheduler: Any) -> ThinkTags | None:
    """The tags of the base model's thinking, where the host knows them and the end tag is one token."""
    from sglang.srt.parser.reasoning_parser import ReasoningParser
    from sglang.srt.runtime_context import get_serving

    end = scheduler.model_config.think_end_ids
    if scheduler.tokenizer is None or end is None or len(end) != 1:
        return None
    name = get_serving().reasoning_parser
    parser = ReasoningParser(model_type=name, stream_reasoning=False, tokenizer=scheduler.tokenizer)
    start = scheduler.tokenizer.encode(parser.detector.think_start_token, add_special_tokens=False)
    return ThinkTags(start[0] if len(start) == 1 else None, end[0])


def data_parallel_info(result: dict[str, Any], self: Any) -> None:
    """AFTER DataParallelController.get_init_info: what its schedulers say, if all of them serve the LenVM."""
    infos = [info.get("lenvm") for info in self._scheduler_init_infos]
    if infos and all(infos):
        result["lenvm"] = infos[0]


# ----- scheduler: running -------------------------------------------------------------------------------------------


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


# ----- the table ----------------------------------------------------------------------------------------------------

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."
_DATA_PARALLEL = "sglang.srt.managers.data_parallel_controller.DataParallelController."
_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager."
_POOL = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator."
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner."

FRONT_END_HOOKS: tuple[Hook, ...] = (
    ("sglang.srt.server_args.ServerArgs.add_cli_args", "AFTER", add_cli_args),
    ("sglang.srt.server_args.ServerArgs.from_cli_args", "AFTER", from_cli_args),
    ("sglang.srt.entrypoints.engine.Engine._launch_subprocesses", "AROUND", launch_subprocesses),
    ("sglang.srt.entrypoints.http_server._setup_and_run_http_server", "AROUND", setup_http),
    (_TOKENIZER + "_validate_one_request", "AROUND", validate_request),
    (_TOKENIZER + "generate_request", "AROUND", generate_request),
    (_TOKENIZER + "update_request_meta_info", "AROUND", update_meta_info),
    (_TOKENIZER + "_send_one_request", "BEFORE", send_one_request),
)
SCHEDULER_HOOKS: tuple[Hook, ...] = (
    (_SCHEDULER + "maybe_init_draft_worker", "AFTER", load_value_model),
    (_POOL + "_compute_cell_size", "AFTER", add_cell_size),
    (_POOL + "calculate_pool_sizes", "AROUND", leave_scratch),
    (_SCHEDULER + "init_memory_pools", "AFTER", allocate_pools),
    (_SCHEDULER + "init_all_attention_backends", "AFTER", build_backends),
    (_SCHEDULER + "init_all_cuda_graphs", "AFTER", warm_up),
    (_SCHEDULER + "get_output_streamer_class", "AFTER", output_streamer_class),
    (_SCHEDULER + "get_init_info", "AFTER", init_info),
    (_DATA_PARALLEL + "get_init_info", "AFTER", data_parallel_info),
    (_SCHEDULER + "init_req_max_new_tokens", "AFTER", admit_request),
    ("sglang.srt.managers.schedule_batch.Req._compute_max_prefix_len", "AFTER", max_prefix_len),
    ("sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new", "AFTER", forward_batch),
    (_RUNNER + "forward", "AFTER", model_forward),
    (_RUNNER + "sample", "AROUND", model_sample),
    ("sglang.srt.layers.sampler.Sampler.forward", "AROUND", sampler_forward),
    ("sglang.srt.layers.sampler.Sampler._preprocess_logits", "AFTER", preprocess_logits),
    ("sglang.srt.layers.logprob_processor.OutputLogprobProcessor.compute_logprobs", "BEFORE", compute_logprobs),
)
HOOKS: tuple[Hook, ...] = (
    *FRONT_END_HOOKS,
    ("sglang.srt.sampling.sampling_params.SamplingParams.verify", "AFTER", verify_sampling_params),
    *SCHEDULER_HOOKS,
)
"""All that is taken hold of, in the order of the host's start; `verify_sampling_params` is wanted in both processes."""
PASSED_BY = (
    "sglang.srt.layers.sampler.Sampler._sync_token_ids_across_tp",
    "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.has_custom_logit_processor",
    "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.sampling_mask_batch_indices",
)
"""What `sampler_forward` calls and reads in the place of the host's sampler; a server on a host without them must not
start, rather than fail at the first request."""


def hooks_here() -> tuple[Hook, ...]:
    """The hooks of this process's part of this version of the host.

    SGLang loads plug-ins in every process it starts. Resolving a target imports its module with all it needs, for
    nothing where the module belongs to another process. Which part this is can be told by what is imported when
    plug-ins are loaded: a launcher (also `Engine` in somebody's own process) has everything or nothing
    yet, a detokenizer has no scheduler, a scheduler or data-parallel controller has no engine.
    """
    hooks = tuple(hook for hook in HOOKS if hook[0] not in versions.host().lacks)
    if "sglang.srt.entrypoints.engine" in sys.modules:
        return hooks
    if "sglang.srt.managers.scheduler" in sys.modules:
        return tuple(hook for hook in hooks if hook not in FRONT_END_HOOKS)
    return () if "sglang.srt.managers.detokenizer_manager" in sys.modules else hooks


def install() -> None:
    """Register the hooks of this process, after checking that this host has what they take hold of.

    Raises:
        SeamError: unknown version, or a missing target.
    """
    import sglang
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if sglang.__version__ not in versions.SUPPORTED:
        raise SeamError(
            f"lenvm_sglang works with SGLang {', '.join(versions.SUPPORTED)}, this is {sglang.__version__}; install "
            "one of those, or set LENVM_SGLANG_DISABLE=1 to serve without length control."
        )
    hooks = hooks_here()
    needed = [target for target, _, _ in hooks]
    needed += PASSED_BY if any(hook is sampler_forward for _, _, hook in hooks) else ()
    for target in needed:
        try:
            pkgutil.resolve_name(target)
        except (ImportError, AttributeError) as error:
            raise SeamError(
                f"SGLang {sglang.__version__} has no {target} ({error}); lenvm_sglang needs it, set "
                "LENVM_SGLANG_DISABLE=1 to serve without length control."
            ) from error
    process.hooks = hooks
    for target, kind, hook in hooks:
        HookRegistry.register(target, hook, HookType[kind])
    if any(hook is launch_subprocesses for _, _, hook in process.hooks):
        from sglang.srt.entrypoints.engine import Engine

        Engine.server_args_class = staticmethod(build_server_args)


def verify() -> None:
    """Check that every hook of this process is in place.

    Raises:
        SeamError: naming the ones that are not.
    """
    hooks = hooks_here() if process.hooks is None else process.hooks
    missing = [target for target, _, hook in hooks if not _wraps(pkgutil.resolve_name(target), hook)]
    if missing:
        raise SeamError(f"these hooks did not take, so the server would ignore length fields: {', '.join(missing)}.")


def _wraps(function: Any, hook: Callable[..., Any]) -> bool:
    """Whether `hook` is in a function's chain of wrappers (each keeps its hook in its closure)."""
    function = getattr(function, "__func__", function)
    while function is not None:
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        if hook in [c for c in cells if callable(c)]:
            return True
        function = getattr(function, "__wrapped__", None)
    return False
