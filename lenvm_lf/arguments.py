"""The stage's finetuning arguments, and the settings it turns away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

HEADS = (("value",), ("value", "length"))
CENSORED = ("one_sided", "bootstrap", "drop")
TARGETS = ("return", "length", "normalized_length", "log_length")
WEIGHTINGS = ("token", "trajectory")
BATCHES = ("shuffled", "by_prompt")


def parse_gamma(value: Any) -> float | None:
    """`lenvm_gamma`: None for `auto`.

    Raises:
        ValueError: if it is neither `auto` nor a number strictly between 0 and 1.
    """
    if isinstance(value, str) and value.strip().lower() == "auto":
        return None
    try:
        gamma = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError):
        gamma = -1.0
    if not 0.0 < gamma < 1.0:
        raise ValueError(
            f"`lenvm_gamma` must be `auto` or a number strictly between 0 and 1, got {value!r}; "
            "`auto` fits it to the training lengths, the paper uses 0.997 and 0.9998."
        )
    return gamma


def parse_heads(value: Any) -> tuple[str, ...] | None:
    """`lenvm_heads`: None where the default is to be taken.

    Raises:
        ValueError: if it is not one of the two allowed sets.
    """
    if value is None:
        return None
    words = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [value]
    heads = tuple(str(word).strip() for word in words)
    if heads not in HEADS:
        raise ValueError(f"`lenvm_heads` must be `value` or `value,length`, got {value!r}.")
    return heads


def parse_number(name: str, value: Any, allowed: str, fits: Callable[[float], bool]) -> float:
    """A number of the YAML file.

    Args:
        name: the key.
        value: what was read.
        allowed: says what fits, for the message.
        fits: whether a number does.

    Raises:
        ValueError: if it is no number or does not fit.
    """
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not fits(number):
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
    return number


def parse_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check a key that takes one of a few words.

    Raises:
        ValueError: if it is none of them.
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def make_finetuning_arguments(base: Any) -> Any:
    """The host's `FinetuningArguments` with the stage and its fields (a subclass, so the host's own fields stay)."""

    @dataclass
    class FinetuningArguments(base):
        stage: Literal["pt", "sft", "rm", "ppo", "dpo", "kto", "lenvm"] = field(
            default="sft", metadata={"help": "Which stage will be performed in training."}
        )
        lenvm_gamma: str = field(
            default="auto",
            metadata={"help": "Discount per token: auto (0.01^(1/L99) over the training completions) or in (0, 1)."},
        )
        lenvm_heads: str | None = field(
            default=None,
            metadata={"help": "value, or value,length (default for a new model; a checkpoint's own otherwise)."},
        )
        lenvm_length_weight: float = field(
            default=0.1, metadata={"help": "Weight of the length distribution's loss beside the value loss."}
        )
        lenvm_censored: str = field(
            default="one_sided",
            metadata={"help": "Completions cut by max_tokens: one_sided, bootstrap (from the model's value) or drop."},
        )
        lenvm_max_length: int | None = field(
            default=None,
            metadata={"help": "Last bin of the length distribution in tokens (default: longest training completion)."},
        )
        lenvm_target: str = field(
            default="return",
            metadata={
                "help": "What the value head predicts: return, or for comparison length, normalized_length, log_length."
            },
        )
        lenvm_lambda: float = field(
            default=1.0, metadata={"help": "Lambda of GAE's targets in [0, 1]; 1 is the exact return."}
        )
        lenvm_weighting: str = field(
            default="token", metadata={"help": "Mean over tokens (token) or over completions (trajectory)."}
        )
        lenvm_huber: float | None = field(
            default=None, metadata={"help": "Threshold of Huber's loss on the value (default: squared error)."}
        )
        lenvm_batches: str = field(
            default="shuffled", metadata={"help": "shuffled, or by_prompt: the completions of a prompt together."}
        )
        lenvm_shared_prefix: bool = field(
            default=False, metadata={"help": "Compute the prompt once for all its completions in a batch."}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            self.lenvm_gamma_value = parse_gamma(self.lenvm_gamma)
            self.lenvm_head_names = parse_heads(self.lenvm_heads)
            self.lenvm_length_weight = parse_number(
                "lenvm_length_weight",
                self.lenvm_length_weight,
                "a finite number, 0 or more",
                lambda x: 0 <= x < math.inf,
            )
            self.lenvm_lambda = parse_number(
                "lenvm_lambda", self.lenvm_lambda, "a number from 0 to 1", lambda x: 0 <= x <= 1
            )
            if self.lenvm_huber is not None:
                self.lenvm_huber = parse_number(
                    "lenvm_huber", self.lenvm_huber, "a finite number above 0", lambda x: 0 < x < math.inf
                )
            parse_choice("lenvm_censored", self.lenvm_censored, CENSORED)
            parse_choice("lenvm_target", self.lenvm_target, TARGETS)
            parse_choice("lenvm_weighting", self.lenvm_weighting, WEIGHTINGS)
            parse_choice("lenvm_batches", self.lenvm_batches, BATCHES)
            if self.lenvm_target != "return" and (self.lenvm_lambda < 1 or self.lenvm_censored == "bootstrap"):
                key = "lenvm_lambda" if self.lenvm_lambda < 1 else "lenvm_censored: bootstrap"
                raise ValueError(
                    f"`{key}` bootstraps with G_t = r + gamma G_{{t+1}}, which only the discounted return obeys, but "
                    f"`lenvm_target` is {self.lenvm_target!r}; remove one of the two."
                )
            longest = self.lenvm_max_length
            if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 2):
                raise ValueError(f"`lenvm_max_length` must be a whole number of tokens, 2 or more, got {longest!r}.")
            if self.stage != "lenvm":
                given = [name for name, default in LENVM_DEFAULTS.items() if getattr(self, name) != default]
                if given:
                    raise ValueError(
                        f"`{'`, `'.join(given)}` belong(s) to `stage: lenvm`, but the stage is {self.stage!r}; "
                        "set `stage: lenvm` or remove the key."
                    )

    FinetuningArguments.__qualname__ = "FinetuningArguments"
    FinetuningArguments.__module__ = base.__module__
    return FinetuningArguments


LENVM_DEFAULTS: dict[str, Any] = {
    "lenvm_gamma": "auto",
    "lenvm_heads": None,
    "lenvm_length_weight": 0.1,
    "lenvm_censored": "one_sided",
    "lenvm_max_length": None,
    "lenvm_target": "return",
    "lenvm_lambda": 1.0,
    "lenvm_weighting": "token",
    "lenvm_huber": None,
    "lenvm_batches": "shuffled",
    "lenvm_shared_prefix": False,
}


def is_lenvm(model_args: Any) -> bool:
    """Whether the run starts from a local length value model or adapter, which brings its gamma and bins."""
    from lenvm_lf.checkpoint import local_block

    places = [*(model_args.adapter_name_or_path or []), model_args.model_name_or_path]
    return any(local_block(place) is not None for place in places)


def take_over_packing(data_args: Any, finetuning_args: Any) -> None:
    """The stage packs by itself (`lenvm_lf.packing`): keep `neat_packing` from the host, which refuses it outside `sft`
    and would have shortened `cutoff_len` by one for its own collator."""
    finetuning_args.lenvm_neat_packing = bool(data_args.neat_packing)
    if data_args.neat_packing:
        data_args.packing = data_args.neat_packing = False
        data_args.cutoff_len += 1


def check_supported(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Turn away what the stage does not do right, before anything is loaded.

    Raises:
        ValueError: one sentence: the setting, why not, what to do.
    """
    for found, name, why, remedy in _refused(model_args, data_args, training_args, finetuning_args):
        if found:
            raise ValueError(f"stage `lenvm` does not support `{name}`: {why}; {remedy}.")


Rule = tuple[Any, str, str, str]
"""Whether the setting is on, its name, why it is refused, what to do."""


def _refused(model: Any, data: Any, train: Any, tune: Any) -> list[Rule]:
    rules: list[Rule] = [
        (
            data.packing and not data.neat_packing,
            "packing",
            "sequences of one row would see each other",
            "set `neat_packing: true`, which keeps them apart",
        ),
        (
            data.streaming
            and (tune.lenvm_gamma_value is None or tune.lenvm_max_length is None)
            and not is_lenvm(model),
            "streaming` with `lenvm_gamma: auto` or without `lenvm_max_length",
            "both are found in one pass over the data before training",
            "give a number for each, or start from a length value model",
        ),
        (
            data.streaming and data.val_size > 0,
            "val_size` with `streaming",
            "samples of one prompt could fall on both sides",
            "give an `eval_dataset` (`lenvm split` makes one)",
        ),
        (
            data.train_on_prompt or data.mask_history,
            "train_on_prompt` / `mask_history",
            "only the sampled completion has a remaining length",
            "remove it",
        ),
        (
            tune.finetuning_type == "oft",
            "finetuning_type: oft",
            "it is not tested with the heads",
            "use `lora`, `freeze` or `full`",
        ),
        (tune.use_badam, "use_badam", "it needs hooks in the trainer that this stage does not have", "remove it"),
        (tune.use_mca, "use_mca", "Megatron loads its own model classes", "unset USE_MCA"),
        (tune.use_hyper_parallel, "use_hyper_parallel", "it loads its own model classes", "remove it"),
        (
            tune.compute_accuracy,
            "compute_accuracy",
            "there are no token predictions to be right or wrong",
            "remove it; the stage always reports its own metrics",
        ),
        (model.use_unsloth, "use_unsloth", "it bypasses the model class with the heads", "set `use_unsloth: false`"),
        (model.use_kt, "use_kt", "it bypasses the model class with the heads", "set `use_kt: false`"),
        (model.mixture_of_depths, "mixture_of_depths", "it bypasses the model class with the heads", "remove it"),
        (model.shift_attn, "shift_attn", "it changes what a state has seen", "set `shift_attn: false`"),
        (
            model.quantization_bit and (tune.finetuning_type != "lora" or str(model.quantization_method) != "bnb"),
            "quantization_bit` without `finetuning_type: lora` and `quantization_method: bnb",
            "only LoRA on a backbone that bitsandbytes quantises when it is loaded is tested with the heads",
            "set both, or train unquantised",
        ),
        (
            model.export_quantization_bit,
            "export_quantization_bit",
            "a quantised length value model is not tested",
            "export unquantised",
        ),
        (
            model.add_tokens or model.add_special_tokens or model.new_special_tokens_config or model.resize_vocab,
            "resize_vocab` / `add_tokens",
            "a length value model must keep the tokenizer of the base model it steers",
            "remove it",
        ),
    ]
    if train is not None:
        by_length = getattr(train, "train_sampling_strategy", "random") != "random"
        rules += [
            (
                tune.lenvm_batches == "by_prompt" and (by_length or tune.disable_shuffling),
                "lenvm_batches: by_prompt` with `" + ("train_sampling_strategy" if by_length else "disable_shuffling"),
                "both decide the order of the rows",
                "remove one of the two",
            ),
            (
                tune.lenvm_shared_prefix and not (tune.lenvm_batches == "by_prompt" or tune.disable_shuffling),
                "lenvm_shared_prefix` without `lenvm_batches: by_prompt",
                "a batch would hardly hold two completions of one prompt",
                "set `lenvm_batches: by_prompt`, or `disable_shuffling: true` where the file is in order of prompts",
            ),
            (
                data.streaming and train.dataloader_num_workers < 1,
                "streaming` with `dataloader_num_workers: 0",
                "LlamaFactory makes one shard of the stream for each worker",
                "set `dataloader_num_workers: 1` or more",
            ),
            (
                data.streaming and (by_length or tune.lenvm_batches == "by_prompt" or data.neat_packing),
                "streaming` with `"
                + ("neat_packing" if data.neat_packing else "train_sampling_strategy` or `lenvm_batches: by_prompt"),
                "all rows must be known to put them in order",
                "remove one of the two",
            ),
            (
                data.neat_packing and (by_length or tune.lenvm_batches == "by_prompt" or tune.lenvm_shared_prefix),
                "neat_packing` with `"
                + (
                    "train_sampling_strategy"
                    if by_length
                    else "lenvm_shared_prefix"
                    if tune.lenvm_shared_prefix
                    else "lenvm_batches: by_prompt"
                ),
                "each decides by itself which rows go together",
                "remove one of the two",
            ),
            (
                train.label_smoothing_factor,
                "label_smoothing_factor",
                "the targets are lengths, not tokens",
                "remove it",
            ),
            (
                train.predict_with_generate,
                "predict_with_generate",
                "a length value model does not generate",
                "remove it; `do_predict: true` writes the predicted lengths",
            ),
            (
                getattr(train, "fp8", False),
                "fp8",
                "it is not tested with the heads",
                "use `bf16: true`",
            ),
            (
                getattr(train, "use_liger_kernel", False),
                "use_liger_kernel",
                "its fused loss replaces the forward pass of the causal class",
                "set `enable_liger_kernel: true`, LlamaFactory's own switch, which leaves the loss alone",
            ),
        ]
    return rules
