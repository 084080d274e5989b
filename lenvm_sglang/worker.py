"""The value model beside the base model: its runner, its KV cache and its two kinds of forward.

KV bookkeeping in one paragraph. The value model's KV pool is addressed by the **base model's slot ids**, so prefix
reuse, chunked prefill, retraction and abort need no bookkeeping of ours: whatever slot the host gives a token, the
value KV of that token lives in the same slot. Behind them lie scratch slots, K for each row of the host's request pool.
A candidate forward writes the KV of a row's K candidates there; `chosen` notes the slot of the one drawn, and when the
host feeds that token in its next step, `follow` copies the KV to the slot the token got. Requests with length fields
have a radix-tree namespace of their own (`lenvm_sglang.admission`), so that a reused prefix always has value KV, and
requests without length fields are neither prefilled nor scored here.

A value model that reads images reads those of the prompt through its own vision tower. SGLang keeps what a tower made
of an image under the image's hash, in a cache of the process; the value model's tower has a cache of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lenvm.candidates import Candidates
from lenvm.format import LenvmConfig, read_lenvm_config
from lenvm.guidance import Scores
from lenvm_kernels import DrawBuffers, Keep, SlotBuffers, TiltSample, uses_triton
from lenvm_kernels.dispatch import HALVES, MAX_FEATURES
from lenvm_sglang.batches import select_rows
from lenvm_sglang.forwards import CandidateForward, GatheredForward, HostForward
from lenvm_sglang.fused import Captured, FusedForward
from lenvm_sglang.graphs import width_buckets
from lenvm_sglang.model import reads_images, register_architecture
from lenvm_sglang.rows import LengthRows, Place, Places, Read
from lenvm_sglang.settings import Settings, StartError
from lenvm_sglang.state import RowTable, to_device
from lenvm_sglang.versions import bind_slots

if TYPE_CHECKING:
    from lenvm_sglang.lookahead import LastStates

logger = logging.getLogger(__name__)

MOST_REQUESTS = 4096
"""The host's own upper bound of running requests where none is set: what scratch is budgeted for before it is known."""

SLOT_BACKENDS = ("flashinfer", "triton", "fa3", "torch_native")
"""The host's attention backends that address KV by the slot, or take a page size of 1 whatever the base model's is."""


class ValueWorker:
    """Owns the value model in one scheduler process.

    Attributes:
        reads_base: the host must keep the base model's hidden states.
        sees_images: the value model has a vision tower.
        own_prefixes: cached prefixes of requests with length fields are kept apart, because they have value KV.
        ahead: where the checkpoint has a lookahead head (`lenvm_sglang.lookahead`), what scores from one state.
    """

    own_prefixes = True
    reads_base = False
    ahead: LastStates | None = None

    def __init__(self, scheduler: Any, settings: Settings) -> None:
        from sglang.srt.model_executor.model_runner import ModelRunner
        from sglang.srt.runtime_context import get_device, get_schedule

        self.settings = settings
        self.lenvm: LenvmConfig = read_lenvm_config(settings.model)
        self.base = scheduler.tp_worker.model_runner
        architecture = architecture_of(settings.model)
        register_architecture(architecture)
        self.sees_images = reads_images(architecture)
        self.embeddings: Any = None
        self.runner = ModelRunner(
            model_config=value_config(settings, scheduler.server_args, self.base.model_config.context_len),
            mem_fraction_static=get_schedule().mem_fraction_static,
            gpu_id=get_device().gpu_id,
            nccl_port=scheduler.nccl_port,
            server_args=scheduler.server_args,
            is_draft_worker=True,
        )
        self.vocabulary = self.base.model_config.vocab_size
        self.width = self.scratch_width = min(settings.max_candidates, self.vocabulary)
        self.widths = width_buckets(self.width)
        self.prefill_tokens = 0
        self.scored_rows = 0
        logger.info("lenvm: %s loaded from %s", type(self.runner.model).__name__, settings.model)

    def info(self) -> dict[str, Any]:
        """What `GET /lenvm/info` says of the value model."""
        architecture = architecture_of(self.settings.model)
        return describe(self.settings, architecture, self.width, self.lenvm, self.sees_images)

    # ----- memory ---------------------------------------------------------------------------------------------------

    def bytes_per_token(self) -> int:
        """Value KV of one token, for the host's KV budget."""
        from sglang.srt.runtime_context import get_parallel

        config = self.runner.model_config
        heads = config.get_num_kv_heads(get_parallel().attn_tp_size)
        element = torch._utils._element_size(self.base.kv_cache_dtype)
        return 2 * heads * config.head_dim * config.num_hidden_layers * element

    def scratch_bytes(self, max_requests: int | None) -> int:
        """Value KV of the candidates, for the host's KV budget."""
        return (max_requests or MOST_REQUESTS) * self.scratch_width * self.bytes_per_token()

    def allocate(self) -> None:
        """Make the value KV pool and the parameter table, once the base's pools exist.

        Raises:
            StartError: the base's KV cache is of a kind whose slots the value model cannot share.
        """
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
        from sglang.srt.runtime_context import get_parallel

        base, runner = self.base, self.runner
        allocator = type(base.token_to_kv_pool_allocator).__name__
        if allocator not in ("TokenToKVPoolAllocator", "PagedTokenToKVPoolAllocator"):
            raise StartError(
                f"--lenvm-model needs a base model whose KV cache is one plain token pool, got {allocator}; serve a "
                "base model without sliding-window or recurrent layers."
            )
        # the host's first page is its dump for padded rows
        slots = base.token_to_kv_pool.size + base.token_to_kv_pool.page_size
        self.request_rows = base.req_to_token_pool.req_to_token.shape[0]
        config = runner.model_config
        self.pool = MHATokenToKVPool(
            slots + self.request_rows * self.scratch_width,
            page_size=1,
            dtype=base.kv_cache_dtype,
            head_num=config.get_num_kv_heads(get_parallel().attn_tp_size),
            head_dim=config.head_dim,
            layer_num=config.num_hidden_layers,
            device=base.device,
            enable_memory_saver=False,
        )
        device = base.req_to_token_pool.req_to_token.device
        scratch = torch.arange(slots, slots + self.request_rows * self.scratch_width, device=device)
        scratch = scratch.view(self.request_rows, self.scratch_width)
        self.places = Places(RowTable(self.request_rows, device), scratch, self.widths, self.vocabulary)
        self.chosen = torch.zeros(self.request_rows, dtype=torch.int64, device=device)
        scales = (*(self.pool.k_scale_buffer or ()), *(self.pool.v_scale_buffer or ()))  # of a quantised KV cache
        self.kv = SlotBuffers([*self.pool.k_buffer, *self.pool.v_buffer, *scales])
        self.waits_for_nobody = device.type == "cpu"
        logger.info(
            "lenvm: value KV pool of %d slots (%d of them scratch), %.1f MB",
            self.pool.size,
            self.request_rows * self.scratch_width,
            self.pool.size * self.bytes_per_token() / 2**20,
        )

    def build_backends(self) -> None:
        """Attention of the two kinds of forward: whole sequences, and candidate rows."""
        base, runner = self.base, self.runner
        runner.token_to_kv_pool = self.pool
        runner.token_to_kv_pool_allocator = base.token_to_kv_pool_allocator
        runner.req_to_token_pool = base.req_to_token_pool
        runner.max_running_requests = base.max_running_requests
        runner.max_total_num_tokens = base.max_total_num_tokens
        refuse_pages(base.page_size, (base.prefill_attention_backend_str, base.decode_attention_backend_str))
        runner.page_size = 1  # candidates stand in single slots
        runner.init_kv_index_translator()
        runner.init_attention_backends()
        self.sequences, self.sequence_slots = runner.attn_backend, runner.kv_index_translator
        self.build_forward()

    def build_forward(self) -> None:
        """Choose the way in which candidates are scored here."""
        ways: dict[str, Callable[[ValueWorker], CandidateForward]] = {
            "gathered": GatheredForward, "fused": FusedForward, "host": HostForward
        }  # fmt: skip
        self.candidates = ways[self.attention()](self)

    def attention(self) -> Literal["gathered", "fused", "host"]:
        """Which attention the new tokens of a decode step get: plain torch, our kernel's or the host's."""
        config, plain = self.runner.model_config, plain_attention(self.runner.model)
        halves = self.base.kv_cache_dtype == self.runner.dtype and self.runner.dtype in HALVES
        narrow = max(config.head_dim, config.v_head_dim) <= MAX_FEATURES
        if plain and self.waits_for_nobody and self.runner.decode_attention_backend_str == "torch_native":
            return "gathered"
        if plain and halves and narrow and uses_triton(self.pool.k_buffer[0]):
            return "fused"
        return "host"

    def warm_up(self) -> None:
        """Once the host has made its own CUDA graphs: try the candidates' forward, and make those of it."""
        if not runs(self.candidates.probe):
            self.candidates = HostForward(self)
        self.make_graphs(self.candidates)

    def make_graphs(self, forward: object) -> None:
        """CUDA graphs of a forward, if there can be any and the host makes some of its own."""
        from sglang.srt.runtime_context import get_parallel

        if not isinstance(forward, Captured) or self.base.decode_cuda_graph_runner in (None, self.base.eager_runner):
            return
        if get_parallel().tp_size > 1:
            logger.info("lenvm: no CUDA graphs of the value model under tensor parallelism yet.")
            return
        forward.capture()

    # ----- forwards -------------------------------------------------------------------------------------------------

    def follow(self, batch: Any, rows: LengthRows, output: Any) -> Read | None:
        """Give the tokens that the base model just read their value KV.

        Args:
            batch: the host's forward batch, after its forward.
            rows: its rows with length fields.
            output: the host's logits output.

        Returns:
            What a prefill read; None for a decode step.
        """
        if batch.forward_mode.is_decode():
            place = self.places.step(batch, rows)
            self.candidates.follow(batch, rows, place, Keep(self.kv, self.chosen, place.take(batch.out_cache_loc)))
            return None
        index = to_device(rows.index, torch.int64, batch.seq_lens.device)
        self.places.write(batch.req_pool_indices[index].long(), rows.states)
        part = select_rows(batch, rows.index, index)
        bind_slots(self.sequence_slots, part)
        self.prefill_tokens += part.extend_num_tokens
        self.sequences.init_forward_metadata(part)
        hidden = self.forward(part, self.sequences)
        return Read(hidden, list(part.extend_prefix_lens_cpu), list(part.extend_seq_lens_cpu))

    def emitted(self, batch: Any, place: Place) -> Tensor:
        """[R] tokens that the rows' targets have counted before this step's."""
        return self.candidates.emitted(batch, place)

    def memory(self, batch: Any, place: Place) -> Candidates | None:
        """[R, K'] memory for the step's candidates; None where any will do."""
        return self.candidates.memory(batch, place)

    def drawn(self, place: Place, candidates: Candidates) -> TiltSample | None:
        """What the last `score` drew from the candidates as their rows ask; None where it drew nothing."""
        return self.candidates.drawn(place, candidates)

    def host_lengths(self, batch: Any, place: Place) -> Tensor:
        """[R] at least as many tokens as each row has read: the host's mirror of the sequence lengths, or, where it
        keeps none, all that a sequence may have."""
        mirror = batch.seq_lens_cpu
        if mirror is None and self.waits_for_nobody:
            mirror = batch.seq_lens
        if mirror is None:
            return torch.full((len(place.states),), self.base.model_config.context_len - 1)
        return mirror if place.whole else mirror[place.host_index]

    def scores(self, read: Read, index: Sequence[int]) -> Scores:
        """Scores of the states after the tokens `index` of a prefill, [len(index)]."""
        return self.scores_of(read.hidden[to_device(list(index), torch.int64, read.hidden.device)])

    def scores_of(self, hidden: Tensor, value: bool = True) -> Scores:
        """Scores [...] of hidden states [..., H], z only if `value`."""
        scores: Scores = self.runner.model.scores(hidden, value)
        return scores

    def score(self, batch: Any, place: Place, candidates: Candidates, value: bool = True) -> Scores:
        """Scores of the states after each candidate, from one forward; their KV stays in scratch.

        Args:
            batch: the host's forward batch.
            place: R rows of it.
            candidates: [R, K'] with K' <= K.
            value: whether z is wanted.

        Returns:
            Scores [R, K']; zeros in slots that were not fed, and z = 0 where it was not wanted.
        """
        self.scored_rows += len(place.states)
        return self.candidates.score(batch, place, candidates, value)

    def rotary(self, place: Place, positions: Tensor, width: int, part: slice = slice(None)) -> Tensor | None:
        """Rotary positions of candidates at `positions` [R * K], if the value model reads images."""
        if place.shift is None:
            return positions if self.sees_images else None
        return positions + place.shift[part, None].expand(-1, width).reshape(-1)

    def draw_buffers(self, place: Place, logits: Tensor | None) -> DrawBuffers:
        """Where a draw of the rows goes: their logits [B, V], if given, and `chosen`, for the next `follow`."""
        return DrawBuffers(logits, None if place.whole else place.index, self.chosen, place.slots, place.scratch)

    def remember_first(self, place: Place) -> None:
        """Note that each row's first candidate is its next token; the next `follow` keeps its KV."""
        self.chosen.index_copy_(0, place.slots, place.scratch[:, 0])

    def forward(self, batch: Any, backend: Any) -> Tensor:
        """Hidden states [N, H] of a batch of the host's, or of ours, under an attention backend."""
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        own = self._own_embeddings() if self.sees_images and batch.forward_mode.is_extend() else nullcontext()
        with forward_context(ForwardContext(attn_backend=backend)), own:
            return self.runner.model.forward(batch.input_ids, batch.positions, batch)

    @contextmanager
    def _own_embeddings(self) -> Iterator[None]:
        """The host's cache of image embeddings, which knows an image by its hash alone, is ours meanwhile."""
        from sglang.srt.managers import mm_schedule
        from sglang.srt.mem_cache.multimodal_cache import MultiModalStaticCache

        theirs = mm_schedule.embedding_cache
        if self.embeddings is None:
            self.embeddings = MultiModalStaticCache(theirs.max_size)
        mm_schedule.embedding_cache = self.embeddings
        try:
            yield
        finally:
            mm_schedule.embedding_cache = theirs


def value_config(settings: Settings, server_args: Any, context_length: int) -> Any:
    """The host's ModelConfig of the value model.

    Its checkpoint says how it is stored: the base model's `--quantization`, which the host hands on to draft models,
    its config overrides and `--trust-remote-code` do not apply to it.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.configs.model_config import ModelConfig

    resolved = resolving_view(server_args)
    return ModelConfig(
        settings.model,
        trust_remote_code=False,
        context_length=context_length,
        enable_multimodal=resolved.enable_multimodal,
        dtype=resolved.dtype,
        model_impl=resolved.model_impl,
        is_draft_model=True,
    )


def runs(probe: Callable[[], None]) -> bool:
    """Whether our own attention can be run; where it cannot, the log says that the host's takes its place."""
    try:
        probe()
    except Exception as error:  # whatever a kernel raises on a device that it was not tried on
        logger.warning(
            "lenvm: the host's attention runs the value model's steps, which is slower, because our own raised %s: %s. "
            "Please report this.", type(error).__name__, error, exc_info=error,
        )  # fmt: skip
        return False
    return True


def describe(
    settings: Settings, architecture: str, width: int, lenvm: LenvmConfig, images: bool = False
) -> dict[str, Any]:
    """What `GET /lenvm/info` says of a checkpoint."""
    return {
        "model": settings.model,
        "architecture": architecture,
        "images": images,
        "max_candidates": width,
        "gamma": lenvm.gamma,
        "heads": list(lenvm.heads),
        "bins": list(lenvm.bins),
        "base_model": lenvm.base_model,
        "format": lenvm.format,
    }


def architecture_of(directory: str) -> str:
    """The architecture that a checkpoint's config names."""
    import json
    from pathlib import Path

    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    return config["architectures"][0]


def refuse_pages(page_size: int, backends: tuple[str, str]) -> None:
    """A base model with pages of several tokens shares its slot ids with a value model that reads single slots.

    Raises:
        StartError: an attention backend of the value model (for prefill, for decode) that may not be able to.
    """
    unfit = [backend for backend in backends if backend not in SLOT_BACKENDS]
    if page_size > 1 and unfit:
        raise StartError(
            f"--lenvm-model with page_size={page_size} needs an attention backend that can read single KV slots, got "
            f"{unfit[0]!r}; run with --page-size 1, or with --attention-backend set to one of "
            f"{', '.join(SLOT_BACKENDS)}."
        )


def plain_attention(model: torch.nn.Module) -> bool:
    """Whether every attention layer is full, causal, uncapped and at one temperature, which is what the backends of
    `lenvm_sglang.attention` compute. What a model says only when it calls them, they refuse there."""
    from sglang.srt.layers.radix_attention import RadixAttention

    layers = [m for m in model.modules() if isinstance(m, RadixAttention)]
    return bool(layers) and not any(
        layer.is_cross_attention
        or layer.logit_cap
        or (layer.sliding_window_size or -1) > -1
        or layer.use_irope
        or layer.xai_temperature_len > 0
        for layer in layers
    )
