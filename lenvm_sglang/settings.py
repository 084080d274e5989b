"""The plug-in's flags, and every reason to refuse a start: checked in the launcher, before any process is spawned."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lenvm.format import ARCHITECTURE_SUFFIX, LenvmConfig, read_lenvm_config

DEFAULT_MAX_CANDIDATES = 16
DEFAULT_CANDIDATE_MASS = 1.0
DEFAULT_MIN_ENTROPY = 0.0
MAX_CANDIDATES_LIMIT = 256
ATTRIBUTE = "_lenvm"
"""Where the settings ride on SGLang's ServerArgs. A name that begins with an underscore and is no field of the record
is bookkeeping there: it may be set at any time and travels to the child processes."""


class StartError(RuntimeError):
    """The server must not start; the message is one sentence for the operator."""


@dataclass(frozen=True)
class Settings:
    """`--lenvm-model` and the flags beside it.

    Attributes:
        model: directory of the length value model.
        max_candidates: K, the most candidates of a token that are scored.
        candidate_mass: of them, only the most probable that hold this much of their probability, and stop tokens.
        min_entropy: nats; where the candidates' distribution has less, the base model draws and nothing is scored.
    """

    model: str
    max_candidates: int = DEFAULT_MAX_CANDIDATES
    candidate_mass: float = DEFAULT_CANDIDATE_MASS
    min_entropy: float = DEFAULT_MIN_ENTROPY

    def __post_init__(self) -> None:
        if not 2 <= self.max_candidates <= MAX_CANDIDATES_LIMIT:
            raise StartError(
                f"--lenvm-max-candidates must be between 2 and {MAX_CANDIDATES_LIMIT}, got {self.max_candidates}."
            )
        if not 0 < self.candidate_mass <= 1:
            raise StartError(
                f"--lenvm-candidate-mass must be above 0 and at most 1 (all candidates), got {self.candidate_mass}."
            )
        if not 0 <= self.min_entropy < math.inf:
            raise StartError(
                f"--lenvm-min-entropy must be a number of nats, at least 0 (always guide), got {self.min_entropy}."
            )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the plug-in's flags to the launcher's parser."""
    group = parser.add_argument_group("lenvm", "length prediction and control")
    group.add_argument(
        "--lenvm-model",
        type=str,
        default=None,
        metavar="DIR",
        help="Serve this length value model beside the base model and accept the length_* request fields.",
    )
    group.add_argument(
        "--lenvm-max-candidates",
        type=int,
        default=None,
        metavar="K",
        help=f"Most candidates of a token that the length value model scores (default {DEFAULT_MAX_CANDIDATES}).",
    )
    group.add_argument(
        "--lenvm-candidate-mass",
        type=float,
        default=None,
        metavar="P",
        help="Score only the most probable candidates that hold this share of their probability, and stop tokens "
        f"(default {DEFAULT_CANDIDATE_MASS:g}; 1 is all).",
    )
    group.add_argument(
        "--lenvm-min-entropy",
        type=float,
        default=None,
        metavar="NATS",
        help="Let the base model draw, and score nothing, where the candidates' entropy is below this "
        f"(default {DEFAULT_MIN_ENTROPY:g}).",
    )


OPTIONS = ("max_candidates", "candidate_mass", "min_entropy")
"""Settings beside the model: `--lenvm-max-candidates` and so on; for `Engine`, `lenvm_max_candidates`."""


def settings_from(given: Mapping[str, Any]) -> Settings | None:
    """Settings of `lenvm_model`, `lenvm_max_candidates`, ... in `given` (None counts as absent); None without a model.

    Raises:
        StartError: a bad value, or an option without a model.
    """
    options = {name: given[f"lenvm_{name}"] for name in OPTIONS if given.get(f"lenvm_{name}") is not None}
    model = given.get("lenvm_model")
    if model is None:
        for name in options:
            raise StartError(
                f"--lenvm-{name.replace('_', '-')} needs --lenvm-model; give the length value model's directory."
            )
        return None
    return Settings(model, **options)


def attach(server_args: Any, settings: Settings | None) -> None:
    """Put the settings on the host's ServerArgs, as plain values that any process can unpickle."""
    setattr(server_args, ATTRIBUTE, None if settings is None else asdict(settings))
    if settings is not None and is_attached(settings):
        keep_states(server_args)


def settings_of(server_args: Any) -> Settings | None:
    """The settings of a host process; None where no LenVM is served."""
    values = getattr(server_args, ATTRIBUTE, None)
    return None if values is None else Settings(**values)


@dataclass(frozen=True)
class Refusal:
    """A host setting that is not supported beside a LenVM, and what to do instead."""

    field: str
    allowed: tuple[Any, ...]
    remedy: str


REFUSALS = (
    Refusal("pp_size", (1,), "run without pipeline parallelism (--pp-size 1)"),
    Refusal("speculative_algorithm", (None,), "drop --speculative-algorithm"),
    Refusal("dcp_size", (1,), "run without decode context parallelism"),
    Refusal("attn_cp_size", (1,), "run without context parallelism"),
    Refusal("disaggregation_mode", ("null", None), "run prefill and decode in one server"),
    Refusal("enable_hierarchical_cache", (False,), "drop --enable-hierarchical-cache"),
    Refusal("enable_lmcache", (False,), "drop --enable-lmcache"),
    Refusal("enable_unified_memory", (False,), "drop --enable-unified-memory"),
    Refusal("enable_unified_cache_external_linker", (False,), "drop --enable-unified-cache-external-linker"),
    Refusal("enable_hisparse", (False,), "drop --enable-hisparse"),
    Refusal("enable_mixed_chunk", (False,), "drop --enable-mixed-chunk"),
    Refusal("enable_pdmux", (False,), "drop --enable-pdmux"),
    Refusal("enable_two_batch_overlap", (False,), "drop --enable-two-batch-overlap"),
    Refusal("dllm_algorithm", (None,), "serve an autoregressive model"),
    Refusal("elastic_ep_backend", (None,), "drop --elastic-ep-backend"),
    Refusal("enable_session_radix_cache", (False,), "drop --enable-session-radix-cache"),
    Refusal("enable_streaming_session", (False,), "drop --enable-streaming-session"),
    Refusal("tokenizer_worker_num", (1,), "run with --tokenizer-worker-num 1"),
    Refusal("enable_memory_saver", (False,), "drop --enable-memory-saver"),
    Refusal("skip_tokenizer_init", (False,), "drop --skip-tokenizer-init"),
    Refusal("enable_http2", (False,), "use HTTP/1.1"),
    Refusal("smg_grpc_mode", (False,), "use the HTTP server"),
    Refusal("grpc_mode", (False,), "use the HTTP server"),
    Refusal("grpc_port", (None,), "use the HTTP server"),
    Refusal("use_ray", (False,), "drop --use-ray"),
    Refusal("mm_enable_dp_encoder", (False, None), "drop --mm-enable-dp-encoder"),
    Refusal("enable_mm_global_cache", (False, None), "drop --enable-mm-global-cache"),
    Refusal("enable_adaptive_dispatch_to_encoder", (False, None), "drop --enable-adaptive-dispatch-to-encoder"),
    Refusal("encoder_only", (False,), "serve the whole model"),
    Refusal("language_only", (False,), "serve the whole model"),
    Refusal("rl_on_policy_target", (None,), "drop --rl-on-policy-target"),
)
"""Settings that are refused until they are built and tested, in every version of the host."""


def refuse_adapters(resolved: Any) -> None:
    """An attached head reads the base model's own hidden state.

    Raises:
        StartError: LoRA is on, whose adapters change that state.
    """
    if resolved.enable_lora:
        raise StartError(
            "an attached length value model reads the base model's hidden states, which LoRA adapters change; merge "
            "the adapter into the base model and distil a head for it, or serve a length value model of its own."
        )


def refuse_settings(resolved: Any, of_this_host: Sequence[Refusal] = ()) -> None:
    """Compare the host's resolved settings with `REFUSALS`, and with those of this version of the host alone.

    Raises:
        StartError: naming the setting, its value, and what to do.
    """
    for refusal in (*REFUSALS, *of_this_host):
        value = getattr(resolved, refusal.field)
        if value not in refusal.allowed:
            raise StartError(
                f"--lenvm-model does not work together with {refusal.field}={value!r} yet; {refusal.remedy}, "
                "or start without --lenvm-model."
            )


def check_checkpoint(settings: Settings, base_path: str, context_length: int) -> LenvmConfig:
    """Read the LenVM's config and compare it with the base model.

    Raises:
        StartError: not a length value model, another tokenizer, or a shorter context than the server's.
    """
    from lenvm.format import LenvmFormatError

    try:
        lenvm = read_lenvm_config(settings.model)
    except LenvmFormatError as error:
        raise StartError(str(error)) from None
    config = json.loads((Path(settings.model) / "config.json").read_text(encoding="utf-8"))
    architectures = config.get("architectures") or []
    if len(architectures) != 1 or not architectures[0].endswith(ARCHITECTURE_SUFFIX):
        raise StartError(
            f"{settings.model} names the architectures {architectures}; a length value model names exactly one, "
            f"which ends in {ARCHITECTURE_SUFFIX}."
        )
    text = config.get("text_config", config)
    longest = text.get("max_position_embeddings")
    if longest is not None and longest < context_length and not text.get("rope_scaling"):
        raise StartError(
            f"the length value model {settings.model} reads at most {longest} tokens and the server's context is "
            f"{context_length}; start with --context-length {longest} or train one with a longer context."
        )
    compare_tokenizers(settings.model, base_path)
    return lenvm


def is_attached(settings: Settings) -> bool:
    """Whether the checkpoint is a head on the base model's own state; False where it cannot be read at all."""
    lenvm = _readable(settings)
    return lenvm is not None and bool(lenvm.attached)


def looks_ahead(settings: Settings) -> bool:
    """Whether it has a lookahead head, attached or not; False where it cannot be read at all."""
    lenvm = _readable(settings)
    return lenvm is not None and lenvm.has_lookahead_head


def _readable(settings: Settings) -> LenvmConfig | None:
    from lenvm.format import LenvmFormatError

    try:
        return read_lenvm_config(settings.model)
    except LenvmFormatError:  # `check_checkpoint` says what is wrong
        return None


def keep_states(server_args: Any) -> None:
    """Have the host capture its CUDA graphs with the hidden state of each last token; batches ask for it themselves."""
    if server_args.return_hidden_states_mode is None and not server_args.enable_return_hidden_states:
        server_args.return_hidden_states_mode = "last"


def check_attached(settings: Settings, tokenizer: str, model: str) -> None:
    """Compare an attached head with the base model.

    Args:
        tokenizer, model: directories or hub names of the base's.

    Raises:
        StartError: another base model or tokenizer, or a damaged checkpoint.
    """
    from lenvm.attached import AttachedHead
    from lenvm.format import LenvmFormatError

    try:
        AttachedHead.from_pretrained(settings.model, local_directory(model))
    except LenvmFormatError as error:
        raise StartError(str(error)) from None
    compare_tokenizers(settings.model, tokenizer)


def local_directory(model: str) -> str:
    """Where the weights of a model lie: a directory, or the hub's local cache.

    Raises:
        StartError: they are not on this machine.
    """
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(model, local_files_only=True))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        raise StartError(
            f"an attached length value model is checked against the base model's files, and {model!r} is not on this "
            f"machine yet; download it first (`hf download {model}`)."
        ) from None


def compare_tokenizers(lenvm_path: str, base_path: str) -> None:
    """Refuse a LenVM whose token ids mean something else than the base model's.

    Raises:
        StartError: naming the first difference.
    """
    from transformers import AutoTokenizer

    # transformers makes up an empty tokenizer where there is none
    if not any(Path(lenvm_path).glob("tokenizer*")):
        raise StartError(
            f"the length value model {lenvm_path} has no tokenizer; copy the base model's tokenizer files into it."
        )
    try:
        ours = AutoTokenizer.from_pretrained(lenvm_path).get_vocab()
    except Exception as error:
        raise StartError(
            f"the length value model {lenvm_path} has a tokenizer that cannot be read ({type(error).__name__}: "
            f"{error}); copy the base model's tokenizer files into it."
        ) from None
    theirs = AutoTokenizer.from_pretrained(base_path).get_vocab()
    if ours == theirs:
        return
    different = sorted((t for t in {**ours, **theirs} if ours.get(t) != theirs.get(t)), key=lambda t: theirs.get(t, -1))
    example = different[0]
    raise StartError(
        f"the length value model {lenvm_path} was trained with another tokenizer than {base_path}: {len(different)} "
        f"tokens differ, for example {example!r} is {ours.get(example)} there and {theirs.get(example)} in the base "
        "model; train a length value model for this base model."
    )
