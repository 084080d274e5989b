"""Published checkpoints of the paper's authors into this package's format and back; safetensors files only.

Their layout is a causal LM's directory (the backbone, with or without its lm_head) and beside it
`value_head.safetensors` with the keys `v_head.fc.{weight,bias}` and `v_head.summary.{weight,bias}`, which are W1, b1,
W2 and b2 of Eq. 7. Neither gamma nor the base model is stored there, so both have to be given. Tensors are copied as
they are, one file at a time: nothing is computed, and no more memory is needed than the largest file takes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenvm.format import LenvmConfig, LenvmFormatError, read_lenvm_config

if TYPE_CHECKING:
    from torch import Tensor

VALUE_HEAD_FILE = "value_head.safetensors"
PUBLISHED_KEYS = {
    "v_head.fc.weight": "value_head.w1",
    "v_head.fc.bias": "value_head.b1",
    "v_head.summary.weight": "value_head.w2",
    "v_head.summary.bias": "value_head.b2",
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LM_HEAD = "lm_head."
HEADS = ("value_head.", "length_head.", "lookahead_head.")
COPIED = (
    "*token*.json",
    "*token*.model",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*processor_config.json",
)
"""Tokenizer and processor; `generation_config.json` carries the stop tokens and comes too."""


def from_published(source: Path, out: Path, gamma: float, base_model: str) -> LenvmConfig:
    """Write a length value model with a value head only from a published checkpoint.

    Args:
        source: directory in the published layout.
        out: directory to write; it must not exist or be empty.
        gamma: the discount it was trained with (paper: 0.997 for Qwen2.5, 0.9998 for Qwen3).
        base_model: the model whose completions it was trained on.

    Returns:
        the new `lenvm` block.

    Raises:
        LenvmFormatError: if the source is not in that layout, its tensors do not fit its config, or out is not empty.
    """
    from lenvm.modeling import prepare_config

    config = _config(source)
    if getattr(config, "lenvm", None) is not None:
        raise LenvmFormatError(f"{source} has a `lenvm` block: it is in this package's format already.")
    lenvm = LenvmConfig.parse({"gamma": gamma, "heads": ["value"], "base_model": base_model}, "the new checkpoint")
    head = _published_head(source, config.get_text_config().hidden_size)
    files = _weight_files(source)
    prepared = prepare_config(config, lenvm)
    _check_backbone(source, prepared, {key for file in files for key in _keys(file)})
    _make_empty(out)
    _write_weights(out, files, drop=(LM_HEAD,), extra=head)
    _copy_files(source, out)
    _write_config(out, prepared)
    return lenvm


def to_published(source: Path, out: Path) -> list[str]:
    """Write a length value model's backbone and value head in the published layout.

    Args:
        source: directory of a length value model.
        out: directory to write; it must not exist or be empty.

    Returns:
        what that layout has no place for, one sentence each.

    Raises:
        LenvmFormatError: if the source is no length value model, or out is not empty.
    """
    from lenvm.modeling import backbone_class

    lenvm = read_lenvm_config(source)
    config = _config(source)
    files = _weight_files(source)
    head: dict[str, Tensor] = {}
    for file in files:
        head |= {key: tensor for key, tensor in _tensors(file) if key.startswith(HEADS[0])}
    missing = sorted(set(PUBLISHED_KEYS.values()) - set(head))
    if missing:
        raise LenvmFormatError(f"{source} lacks {', '.join(missing)}, the value head; convert a complete checkpoint.")
    _make_empty(out)
    _write_weights(out, files, drop=HEADS, extra={})
    _save({theirs: head[ours] for theirs, ours in PUBLISHED_KEYS.items()}, out / VALUE_HEAD_FILE)
    _copy_files(source, out)
    del config.lenvm
    config.architectures = [backbone_class(config).__name__]
    _write_config(out, config)
    notes = [f"gamma is {lenvm.gamma!r}: that layout does not store it, and values mean nothing without it."]
    if lenvm.has_length_head:
        notes.append("the length distribution is left behind: that layout has a value head only.")
    if lenvm.has_lookahead_head:
        notes.append("the lookahead head is left behind as well.")
    if not getattr(config.get_text_config(), "tie_word_embeddings", False):
        notes.append("there is no lm_head: load the backbone, or take the lm_head of the base model.")
    return notes


def _config(source: Path) -> Any:
    from transformers import AutoConfig

    if not (source / "config.json").is_file():
        raise LenvmFormatError(f"there is no {source / 'config.json'}; give the directory of a checkpoint.")
    try:
        return AutoConfig.from_pretrained(source)
    except (ValueError, OSError) as error:
        raise LenvmFormatError(f"{source / 'config.json'} cannot be read: {str(error).splitlines()[0]}") from None


def _published_head(source: Path, hidden_size: int) -> dict[str, Tensor]:
    """The value head under our names, its shapes checked against the backbone."""
    file = source / VALUE_HEAD_FILE
    if not file.is_file():
        pickled = (source / "value_head.bin").is_file()
        raise LenvmFormatError(
            f"there is no {file}; "
            + (
                "save `value_head.bin` as safetensors first: pickled weights are not read."
                if pickled
                else "a published checkpoint has its value head there."
            )
        )
    found = dict(_tensors(file))
    if set(found) != set(PUBLISHED_KEYS):
        raise LenvmFormatError(f"{file} must hold {', '.join(PUBLISHED_KEYS)}, got {', '.join(sorted(found))}.")
    wanted = {
        "v_head.fc.weight": (hidden_size, hidden_size),
        "v_head.fc.bias": (hidden_size,),
        "v_head.summary.weight": (1, hidden_size),
        "v_head.summary.bias": (1,),
    }
    for key, shape in wanted.items():
        if tuple(found[key].shape) != shape:
            raise LenvmFormatError(f"{file}: {key} must have the shape {shape}, got {tuple(found[key].shape)}.")
    return {ours: found[theirs] for theirs, ours in PUBLISHED_KEYS.items()}


def _check_backbone(source: Path, config: Any, keys: set[str]) -> None:
    """Every weight of the backbone must be there, and no other; asked of a model without memory."""
    import torch

    from lenvm.modeling import backbone_class, value_class

    concrete = value_class(backbone_class(config))
    if getattr(concrete, "_checkpoint_conversion_mapping", None):
        return  # keys of an older layout are renamed by transformers when it loads the checkpoint
    with torch.device("meta"):
        wanted = {key for key in concrete(config).state_dict() if not key.startswith(HEADS)}
    found = {key for key in keys if not key.startswith(LM_HEAD)}
    for wrong, what in ((wanted - found, "lacks"), (found - wanted, "has no use for")):
        if wrong:
            shown = ", ".join(sorted(wrong)[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise LenvmFormatError(f"the backbone {config.model_type!r} of {source} {what} {shown}; is it complete?")


def _weight_files(source: Path) -> list[Path]:
    """The backbone's safetensors files, one or the shards of the index."""
    index = source / INDEX
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [source / shard for shard in shards]
    else:
        files = [source / WEIGHTS]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise LenvmFormatError(
            f"{source} has no {', '.join(missing)}; weights must be safetensors, pickled ones are not read."
        )
    return files


def _keys(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        return list(handle.keys())


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        for key in handle.keys():  # noqa: SIM118 - not a dict
            yield key, handle.get_tensor(key)


def _write_weights(out: Path, files: list[Path], drop: tuple[str, ...], extra: dict[str, Tensor]) -> None:
    """Copy the files without the dropped keys; the extra tensors go into the last one that keeps any."""
    kept = [file for file in files if any(not key.startswith(drop) for key in _keys(file))]
    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(kept, start=1):
        tensors = {key: tensor for key, tensor in _tensors(file) if not key.startswith(drop)}
        if number == len(kept):
            tensors |= extra
        name = WEIGHTS if len(kept) == 1 else f"model-{number:05d}-of-{len(kept):05d}.safetensors"
        _save(tensors, out / name)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(kept) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})


def _copy_files(source: Path, out: Path) -> None:
    for pattern in (*COPIED, "generation_config.json"):
        for file in source.glob(pattern):
            shutil.copyfile(file, out / file.name)


def _write_config(out: Path, config: Any) -> None:
    config.save_pretrained(out)


def _make_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LenvmFormatError(f"{out} is there already and not empty; choose another directory.")
    out.mkdir(parents=True, exist_ok=True)
