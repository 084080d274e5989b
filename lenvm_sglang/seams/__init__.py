"""Every place where the plug-in takes hold of SGLang: the one package to read when the host moves.

Each hook is a thin function that reads what it needs from the host's objects and calls a module of ours; here is the
list of them. `install` checks the host's version and that every target exists; `verify` checks, when the scheduler is
up, that every hook took (SGLang itself only logs a hook that fails). What differs between the supported versions is in
`lenvm_sglang.versions`.
"""

from __future__ import annotations

import pkgutil
import sys

from lenvm_sglang import versions
from lenvm_sglang.seams.building import (
    add_cell_size,
    allocate_pools,
    build_backends,
    data_parallel_info,
    init_info,
    leave_scratch,
    load_value_model,
    output_streamer_class,
    warm_up,
)
from lenvm_sglang.seams.front_end import (
    generate_request,
    send_one_request,
    update_meta_info,
    validate_request,
    verify_sampling_params,
)
from lenvm_sglang.seams.launcher import (
    add_cli_args,
    build_server_args,
    from_cli_args,
    launch_subprocesses,
    setup_http,
)
from lenvm_sglang.seams.running import (
    admit_request,
    compute_logprobs,
    forward_batch,
    max_prefix_len,
    model_forward,
    model_sample,
    preprocess_logits,
    sampler_forward,
)
from lenvm_sglang.seams.this_process import Hook, SeamError, process, verify

__all__ = ["HOOKS", "SeamError", "hooks_here", "install", "process", "verify"]

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
