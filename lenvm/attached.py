"""Attached length value models: a lookahead head on the frozen base model's own hidden state, and no backbone.

Such a checkpoint is a small directory: `config.json` with the `lenvm` block (`"attached": true`), `model.safetensors`
with `lookahead_head.*`, and the base model's tokenizer. The head means something on the states of the one base model it
was distilled on, so the block carries that model's hash.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lenvm.convert import COPIED
from lenvm.format import ARCHITECTURE_SUFFIX, LenvmConfig, LenvmFormatError, read_lenvm_config
from lenvm.heads import LookaheadHead

ARCHITECTURE = "Attached" + ARCHITECTURE_SUFFIX
WEIGHTS = "model.safetensors"
PREFIX = "lookahead_head."
_BLOCK = 4096
_BLOCKS = 16


def base_hash(directory: str | Path) -> str:
    """A hash of a model's weights: names, dtypes, shapes, and of each tensor 16 blocks of 4 KiB spread over it.

    It does not depend on how the tensors are spread over files, and reads some megabytes of a large model. Any training
    step, merge or quantisation changes it.

    Args:
        directory: local directory with safetensors files.

    Returns:
        64 hexadecimal digits.

    Raises:
        LenvmFormatError: there are none.
    """
    entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for file in _weight_files(directory):
        start, header = _header(file)
        entries |= {name: (file, start, entry) for name, entry in header.items()}
    digest = hashlib.sha256()
    for name in sorted(entries):
        file, start, entry = entries[name]
        digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
        for block in _sampled(file, start + entry["data_offsets"][0], start + entry["data_offsets"][1]):
            digest.update(block)
    return digest.hexdigest()


def _weight_files(directory: str | Path) -> list[Path]:
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise LenvmFormatError(f"{directory} has no safetensors files; give the base model's local directory.")
    return files


def _header(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the tensors begin, and each one's dtype, shape and offsets from there (the safetensors format)."""
    with file.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
    header.pop("__metadata__", None)
    return 8 + size, header


def _sampled(file: Path, begin: int, end: int) -> Iterator[bytes]:
    with file.open("rb") as handle:
        if end - begin <= _BLOCK * _BLOCKS:
            handle.seek(begin)
            yield handle.read(end - begin)
            return
        for i in range(_BLOCKS):
            handle.seek(begin + (end - begin - _BLOCK) * i // (_BLOCKS - 1))
            yield handle.read(_BLOCK)


def check_base(lenvm: LenvmConfig, where: str, base: str | Path) -> None:
    """Compare a base model with the one an attached head was distilled on.

    Raises:
        LenvmFormatError: they differ, or the directory holds no weights.
    """
    found = base_hash(base)
    if found != lenvm.base_hash:
        raise LenvmFormatError(
            f"{where} was distilled on the hidden states of another base model ({lenvm.base_model or 'unnamed'}, hash "
            f"{(lenvm.base_hash or '')[:12]}) than {base} (hash {found[:12]}); run `lenvm distill` on this base model."
        )


def read_tensor(directory: str | Path, key: str) -> Tensor:
    """One tensor of a model's safetensors files.

    Raises:
        LenvmFormatError: no file has it.
    """
    from safetensors import safe_open

    for file in _weight_files(directory):
        if key in _header(file)[1]:
            with safe_open(file, "pt") as handle:
                return handle.get_tensor(key)
    raise LenvmFormatError(f"{directory} has no tensor {key!r}, whose rows an attached head projects.")


class AttachedHead(nn.Module):
    """A lookahead head with its block, ready for inference: its token vectors are a table.

    Attributes:
        lenvm: the block.
        lookahead_head: float32, on the CPU until moved.
    """

    def __init__(self, lenvm: LenvmConfig, head: LookaheadHead) -> None:
        super().__init__()
        self.lenvm = lenvm
        self.lookahead_head = head

    @classmethod
    def from_pretrained(cls, directory: str | Path, base: str | Path) -> AttachedHead:
        """Read an attached checkpoint for its base model.

        Args:
            directory: what `save_attached` wrote.
            base: local directory of the base model.

        Raises:
            LenvmFormatError: it is none, is damaged, or belongs to another base model.
        """
        lenvm = read_lenvm_config(directory)
        if not lenvm.attached or lenvm.lookahead is None or lenvm.hidden_size is None:
            raise LenvmFormatError(
                f"{directory} is not an attached length value model; load it with LengthValueModel.from_pretrained."
            )
        check_base(lenvm, str(directory), base)
        head = _read_head(directory, lenvm)
        source = None if lenvm.lookahead.source is None else read_tensor(base, lenvm.lookahead.source)
        return cls(lenvm, head.with_table(source)).eval()

    def lookahead(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """base states [..., H], next tokens [..., K] int64 -> log q(. | s + x) [..., K, B] float32."""
        return torch.log_softmax(self.lookahead_head(hidden, tokens), dim=-1)


def _read_head(directory: str | Path, lenvm: LenvmConfig) -> LookaheadHead:
    from safetensors.torch import load_file

    assert lenvm.lookahead is not None
    assert lenvm.hidden_size is not None
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        raise LenvmFormatError(f"{directory} has no {WEIGHTS}; distil the head again.")
    state = {key.removeprefix(PREFIX): tensor for key, tensor in load_file(path).items()}
    vectors = "embedding" if lenvm.lookahead.embedding == "table" else "projection"
    wanted = {"w1", "b1", "w2", "b2", vectors}
    if set(state) != wanted:
        raise LenvmFormatError(
            f"{path} must hold {', '.join(PREFIX + k for k in sorted(wanted))}, got {sorted(state)}."
        )
    tokens = state["embedding"].shape[0] if vectors == "embedding" else None
    source_size = None if tokens is not None else state["projection"].shape[0]
    head = LookaheadHead(lenvm.hidden_size, lenvm.lookahead.rank, len(lenvm.bins), tokens, source_size)
    for name, parameter in head.named_parameters():
        if parameter.shape != state[name].shape:
            raise LenvmFormatError(
                f"{path}: {PREFIX}{name} must have the shape {tuple(parameter.shape)}, got {tuple(state[name].shape)}."
            )
    head.load_state_dict(state)
    return head


def save_attached(directory: str | Path, lenvm: LenvmConfig, head: LookaheadHead, base: str | Path) -> None:
    """Write an attached checkpoint: config, weights, and the base model's tokenizer files."""
    from safetensors.torch import save_file

    out = Path(directory)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    for pattern in COPIED:
        for file in Path(base).glob(pattern):
            shutil.copyfile(file, out / file.name)
    base_config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
    config = {"architectures": [ARCHITECTURE], "lenvm": lenvm.to_json(), "model_type": base_config["model_type"]}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
