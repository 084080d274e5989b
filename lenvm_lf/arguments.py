"""The stage's finetuning arguments, and the settings it turns away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

HEADS = (("value",), ("value", "length"))
CENSORED = ("one_sided", "drop")


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


def parse_length_weight(value: Any) -> float:
    """`lenvm_length_weight`.

    Raises:
        ValueError: if it is not a finite number >= 0.
    """
    try:
        weight = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError):
        weight = -1.0
    if not 0.0 <= weight < float("inf"):
        raise ValueError(f"`lenvm_length_weight` must be a finite number, 0 or more, got {value!r}.")
    return weight


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
            metadata={"help": "Completions cut by max_tokens: one_sided (the least they can be) or drop."},
        )
        lenvm_max_length: int | None = field(
            default=None,
            metadata={"help": "Last bin of the length distribution in tokens (default: longest training completion)."},
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            self.lenvm_gamma_value = parse_gamma(self.lenvm_gamma)
            self.lenvm_head_names = parse_heads(self.lenvm_heads)
            self.lenvm_length_weight = parse_length_weight(self.lenvm_length_weight)
            if self.lenvm_censored not in CENSORED:
                raise ValueError(f"`lenvm_censored` must be one of {', '.join(CENSORED)}, got {self.lenvm_censored!r}.")
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
}


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
            data.packing or data.neat_packing,
            "neat_packing" if data.neat_packing else "packing",
            "sequences of one row would see each other or need a block mask that is not tested here",
            "remove it and set `train_sampling_strategy: group_by_length`, which leaves little padding",
        ),
        (
            data.streaming,
            "streaming",
            "gamma, the bins and the check of the rows need one pass over the data before training",
            "set `streaming: false`",
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
            model.quantization_bit or model.export_quantization_bit,
            "quantization_bit",
            "quantised backbones are not tested with the heads",
            "train and export unquantised",
        ),
        (
            model.add_tokens or model.add_special_tokens or model.new_special_tokens_config or model.resize_vocab,
            "resize_vocab` / `add_tokens",
            "a length value model must keep the tokenizer of the base model it steers",
            "remove it",
        ),
    ]
    if train is not None:
        rules += [
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
                getattr(train, "use_liger_kernel", False) or model.enable_liger_kernel,
                "enable_liger_kernel",
                "its fused loss replaces the forward pass of the causal class",
                "remove it",
            ),
        ]
    return rules
