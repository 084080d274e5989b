"""Hooks of a scheduler that comes up: the value model, its memory, its attention and its graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lenvm_sglang import admission, settings
from lenvm_sglang.metrics import step_metrics
from lenvm_sglang.scope import ThinkTags
from lenvm_sglang.seams.this_process import process, verify
from lenvm_sglang.settings import StartError


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
