"""Which `lenvm` block a run works with, the model class with the heads, and what lies beside an adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lenvm.format import LenvmConfig, write_lenvm_config
from lenvm.modeling import HEAD_NAMES, LengthValueModel, backbone_class, prepare_config

ADAPTER_FILE = "lenvm.json"
"""The `lenvm` block beside LoRA weights, which have no config.json of their own."""
IMAGE_MODELS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Model types with a vision tower whose runs were tested."""


def adapter_block(directory: str | Path) -> LenvmConfig | None:
    """The block beside an adapter, or None where there is none.

    Raises:
        LenvmFormatError: if it is not valid.
    """
    path = Path(directory) / ADAPTER_FILE
    if not path.is_file():
        return None
    return LenvmConfig.parse(json.loads(path.read_text(encoding="utf-8")), str(path))


def write_adapter_block(directory: str | Path, lenvm: LenvmConfig) -> None:
    """Write the block beside an adapter."""
    Path(directory, ADAPTER_FILE).write_text(json.dumps(lenvm.to_json(), indent=2) + "\n", encoding="utf-8")


def write_block(directory: str | Path, lenvm: LenvmConfig) -> None:
    """Replace the block of a saved model or adapter."""
    if Path(directory, "config.json").is_file():
        write_lenvm_config(directory, lenvm)
    else:
        write_adapter_block(directory, lenvm)


def local_block(directory: str | Path | None) -> LenvmConfig | None:
    """The block of a local checkpoint or adapter directory, or None."""
    if directory is None or not os.path.isdir(directory):
        return None
    config = Path(directory) / "config.json"
    if config.is_file():
        block = json.loads(config.read_text(encoding="utf-8")).get("lenvm")
        if block is not None:
            return LenvmConfig.parse(block, str(directory))
    return adapter_block(directory)


def stored_block(config: Any, model_args: Any, resume_from: str | bool | None = None) -> tuple[LenvmConfig, str] | None:
    """The block that the run's inputs carry, and where: the checkpoint to resume, the adapter, or the model.

    Raises:
        LenvmFormatError: if a block is there but not valid.
    """
    places = [resume_from if isinstance(resume_from, str) else None, *reversed(model_args.adapter_name_or_path or [])]
    for place in places:
        found = local_block(place)
        if found is not None:
            return found, str(place)
    if getattr(config, "lenvm", None) is not None:  # also a checkpoint on a hub
        return LenvmConfig.parse(config.lenvm, str(model_args.model_name_or_path)), str(model_args.model_name_or_path)
    return None


def agree(stored: LenvmConfig, where: str, finetuning_args: Any) -> None:
    """Refuse arguments that contradict a checkpoint: its values mean something else under another gamma.

    Raises:
        ValueError: naming the argument, both values and what to do.
    """
    gamma = finetuning_args.lenvm_gamma_value
    if gamma is not None and abs(gamma - stored.gamma) > 1e-12:
        raise ValueError(
            f"`lenvm_gamma` is {gamma!r}, but {where} was trained with {stored.gamma!r}; "
            "remove the key (or set it to `auto`) to go on with the checkpoint's, or start from a base model."
        )
    heads = finetuning_args.lenvm_head_names
    if heads is not None and heads != stored.heads:
        raise ValueError(
            f"`lenvm_heads` is {','.join(heads)!r}, but {where} has {','.join(stored.heads)!r}; "
            "remove the key, or start from a base model."
        )
    target, given = stored.value_space.representation, finetuning_args.lenvm_target
    if given not in (target, "return"):  # the default is what a YAML file without the key says
        raise ValueError(
            f"`lenvm_target` is {given!r}, but {where} was trained with {target!r}; "
            "remove the key, or start from a base model."
        )
    if finetuning_args.lenvm_target != target and (
        finetuning_args.lenvm_lambda < 1 or finetuning_args.lenvm_censored == "bootstrap"
    ):
        raise ValueError(
            f"bootstrapped targets (`lenvm_lambda` below 1, `lenvm_censored: bootstrap`) need the discounted return, "
            f"but {where} was trained with {target!r}; remove the key, or start from a base model."
        )
    longest = finetuning_args.lenvm_max_length
    if longest is not None and stored.bins and longest != stored.bins[-1]:
        raise ValueError(
            f"`lenvm_max_length` is {longest}, but the bins of {where} reach {stored.bins[-1]}; "
            "remove the key, or start from a base model."
        )


def refuse_other_stage(model_args: Any, stage: str) -> None:
    """Keep other stages from reading a length value model as if it were a language model (it has no lm_head).

    Raises:
        ValueError: if the model or an adapter of a plain stage is a LenVM's.
    """
    for place in [*(model_args.adapter_name_or_path or []), model_args.model_name_or_path]:
        try:
            found = local_block(place)
        except (OSError, ValueError):  # not ours to judge here
            continue
        if found is not None:
            raise ValueError(f"{place} is a length value model, but the stage is {stage!r}; add `stage: lenvm`.")


class _ClassWithHeads:
    """Stands in for `AutoModelForCausalLM` inside the host's model loader while a length value model is loaded."""

    def __init__(self, auto: Any, lenvm: LenvmConfig) -> None:
        self._model_mapping = auto._model_mapping
        self._lenvm = lenvm

    def from_pretrained(self, pretrained_model_name_or_path: str, config: Any, **kwargs: Any) -> Any:
        from lenvm.modeling import value_class

        return value_class(backbone_class(config)).from_pretrained(
            pretrained_model_name_or_path, config=prepare_config(config, self._lenvm), **kwargs
        )

    def from_config(self, config: Any, **_: Any) -> Any:
        return LengthValueModel.from_backbone(config, self._lenvm)


def load_model(
    loader: Any,
    original: Callable[..., Any],
    tokenizer: Any,
    model_args: Any,
    finetuning_args: Any,
    is_trainable: bool,
) -> Any:
    """The host's `load_model` with the heads: a LenVM checkpoint, or a base model that gets fresh heads.

    Args:
        loader: the host module `llamafactory.model.loader`.
        original: its own `load_model`.

    Raises:
        ValueError: if the backbone does not fit, or is no length value model where one is needed (evaluation, export).
    """
    config = loader.load_config(model_args)
    check_backbone(config)
    lenvm = getattr(finetuning_args, "lenvm_config", None)  # decided by the workflow; `export` comes without one
    if lenvm is None:
        stored = stored_block(config, model_args)
        if stored is None:
            places = [model_args.model_name_or_path, *(model_args.adapter_name_or_path or [])]
            raise ValueError(
                f"{' + '.join(places)} is no length value model: there is no `lenvm` block in its config.json or "
                f"{ADAPTER_FILE}; train it first with `do_train: true`, or name the adapter in `adapter_name_or_path`."
            )
        lenvm = stored[0]
        agree(lenvm, stored[1], finetuning_args)
    if is_trainable and lenvm.has_lookahead_head:
        raise ValueError(
            f"{model_args.model_name_or_path} has a lookahead head, which training would leave behind the rest; go on "
            "from the checkpoint without it and run `lenvm distill` afterwards."
        )
    names = head_names(lenvm)
    if finetuning_args.finetuning_type == "lora":  # the heads are trained in full beside the adapter
        finetuning_args.additional_target = sorted({*(finetuning_args.additional_target or []), *names})
    elif finetuning_args.finetuning_type == "freeze":
        finetuning_args.freeze_extra_modules = sorted({*(finetuning_args.freeze_extra_modules or []), *names})

    autos = {name: getattr(loader, name) for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText")}
    for name, auto in autos.items():
        setattr(loader, name, _ClassWithHeads(auto, lenvm))
    try:
        model = original(tokenizer, model_args, finetuning_args, is_trainable, False)
    finally:
        for name, auto in autos.items():
            setattr(loader, name, auto)
    if is_trainable and finetuning_args.pure_bf16:  # bfloat16 steps would round most of the heads' updates away
        for name, parameter in model.named_parameters():
            if any(head in name for head in names):
                parameter.data = parameter.data.to(torch.float32)
    return model


def sees_images(config: Any) -> bool:
    """Whether a backbone has a vision tower."""
    return hasattr(config, "vision_config")


def check_backbone(config: Any) -> None:
    """Refuse what is neither a causal language model nor a tested vision-language model.

    Args:
        config: of the backbone.

    Raises:
        ValueError: one sentence: what it is, what is allowed.
    """
    from transformers import AutoModelForCausalLM

    if sees_images(config):
        if config.model_type not in IMAGE_MODELS:
            raise ValueError(
                f"stage `lenvm` was tested with the vision-language models {', '.join(IMAGE_MODELS)}, got "
                f"{config.model_type!r}; use one of these or a text model."
            )
    elif type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"stage `lenvm` needs a causal language model or one of {', '.join(IMAGE_MODELS)}, got model type "
            f"{config.model_type!r}."
        )


def head_names(lenvm: LenvmConfig) -> tuple[str, ...]:
    """Submodule names of the heads a checkpoint has."""
    return HEAD_NAMES if lenvm.has_length_head else HEAD_NAMES[:1]
