"""The value model inside SGLang: SGLang's own body of a backbone, with the heads of `lenvm.heads` and no lm_head."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lenvm.format import ARCHITECTURE_SUFFIX, LenvmConfig
from lenvm.guidance import Scores
from lenvm.heads import LengthHead, ValueHead
from lenvm.modeling import lookahead_head
from lenvm_kernels import value_head
from lenvm_sglang.settings import StartError

_HEADS = ("value_head", "length_head", "lookahead_head")
VISION = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
"""Backbones that read images, by the name before `ForConditionalGeneration` and `ForLengthValue`."""


def length_value_class(causal: type) -> type:
    """`Qwen2ForCausalLM` of SGLang -> `Qwen2ForLengthValue`: `forward` gives hidden states, `scores` reads the heads.

    Anything that holds its transformer body in `.model` and reads checkpoints in `load_weights` will do. One that reads
    images (`VISION`) embeds them in its own `forward`, which ends in its logits processor.
    """
    stem = causal.__name__.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration")
    vision = stem in VISION

    class LengthValue(causal):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
            body_config = copy.copy(config)
            body_config.tie_word_embeddings = True  # the constructor then makes no lm_head of its own
            super().__init__(body_config, quant_config=quant_config, prefix=prefix)
            for unused in ("lm_head", "logits_processor", "pooler"):
                if hasattr(self, unused):
                    delattr(self, unused)
            if vision:
                self.lm_head, self.logits_processor = None, _hidden_states
            lenvm = LenvmConfig.parse(getattr(config, "lenvm", None), f"the {type(self).__name__} config")
            text = config.get_text_config()
            hidden_size = text.hidden_size
            self.value_head = ValueHead(hidden_size).float()
            self.length_head = LengthHead(hidden_size, len(lenvm.bins)).float() if lenvm.has_length_head else None
            if lenvm.lookahead is not None:
                self.lookahead_head = lookahead_head(lenvm, hidden_size, text.vocab_size).float()

        @torch.no_grad()
        def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: Any) -> Tensor:
            """[T] token ids and positions -> [T, H] hidden states, in the backbone's dtype."""
            if vision:
                return super().forward(input_ids, positions, forward_batch)
            return self.model(input_ids, positions, forward_batch)

        @torch.no_grad()
        def scores(self, hidden: Tensor, value: bool = True) -> Scores:
            """[..., H] -> z [...] (zeros unless `value`) and length log-probabilities [..., B], float32."""
            log_q = None if self.length_head is None else torch.log_softmax(self.length_head(hidden), dim=-1)
            wanted = value or log_q is None
            z = value_head(hidden, self.value_head) if wanted else hidden.new_zeros(hidden.shape[:-1]).float()
            return Scores(z=z, length_log_q=log_q)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            """Heads into our own parameters, everything else through the host's loader of this backbone.

            Raises:
                StartError: the checkpoint lacks a head's parameter.
            """
            heads = {k: v for k, v in self.named_parameters() if k.startswith(_HEADS)}
            missing = set(heads)

            def body() -> Iterable[tuple[str, Tensor]]:
                for name, tensor in weights:
                    if name in heads:
                        heads[name].data.copy_(tensor)
                        missing.discard(name)
                    elif not name.startswith("lm_head."):
                        yield (_older_name(name) if vision else name), tensor

            super().load_weights(body())
            if missing:
                raise StartError(
                    f"the length value model lacks the parameters {sorted(missing)}; train or export it again."
                )

    LengthValue.__name__ = LengthValue.__qualname__ = stem + ARCHITECTURE_SUFFIX
    return LengthValue


def _hidden_states(input_ids: Tensor, hidden: Tensor, lm_head: None, forward_batch: Any, *_: Any) -> Tensor:
    """In the place of a logits processor: the states themselves."""
    return hidden


def _older_name(name: str) -> str:
    """A vision-language parameter's name as SGLang's loaders know it; they skip some newer ones without a word."""
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)


def reads_images(architecture: str) -> bool:
    """Whether `<X>ForLengthValue` or `<X>ForConditionalGeneration` is one of `VISION`."""
    return architecture.removesuffix(ARCHITECTURE_SUFFIX).removesuffix("ForConditionalGeneration") in VISION


def register_architecture(architecture: str) -> None:
    """Make SGLang's model registry know `<X>ForLengthValue`, built from its `<X>ForCausalLM`, or, if that reads images,
    its `<X>ForConditionalGeneration`.

    Raises:
        StartError: SGLang has no such backbone.
    """
    from sglang.srt.models.registry import ModelRegistry

    if architecture in ModelRegistry.models:
        return
    causal_name = _causal_name(architecture)
    if not ModelRegistry.is_arch_supported(causal_name):
        raise _no_backbone(architecture)
    ModelRegistry.models[architecture] = length_value_class(ModelRegistry.models[causal_name])


def check_architecture(architecture: str) -> None:
    """Look for the backbone in the sources of SGLang's models, which takes milliseconds where importing all of them
    takes ten seconds.

    Raises:
        StartError: SGLang has no such backbone.
    """
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("sglang.srt.models")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    needle = f"class {_causal_name(architecture)}("
    if not any(needle in file.read_text(encoding="utf-8") for folder in folders for file in Path(folder).glob("*.py")):
        raise _no_backbone(architecture)


def check_vision(directory: str, architecture: str, base: Any, base_reads_images: bool) -> None:
    """Compare what a LenVM and its base model make of an image: the LenVM is given the base model's patches.

    Args:
        directory: of the LenVM.
        architecture: `<X>ForLengthValue`.
        base: config of the base model.
        base_reads_images: as the host serves it.

    Raises:
        StartError: a base model that was not tested, or one whose images the LenVM cannot read.
    """
    from transformers import AutoConfig

    named = base.architectures[0]
    if base_reads_images and not reads_images(named):
        raise StartError(
            f"--lenvm-model does not serve the multimodal base model {named} yet; serve a text model, or one of "
            f"{', '.join(f'{stem}ForConditionalGeneration' for stem in VISION)}."
        )
    if not reads_images(architecture):
        return
    if not base_reads_images:
        raise StartError(
            f"the length value model {directory} is a {architecture}, which reads images, and the base model is served "
            "without them; train a length value model on a text backbone."
        )
    ours, theirs = AutoConfig.from_pretrained(directory).vision_config, base.vision_config
    for name in ("patch_size", "temporal_patch_size", "spatial_merge_size"):
        if getattr(ours, name) != getattr(theirs, name):
            raise StartError(
                f"the length value model {directory} reads images with {name} {getattr(ours, name)} and the base model "
                f"with {getattr(theirs, name)}; train one on a backbone of the base model's family."
            )


def _causal_name(architecture: str) -> str:
    suffix = "ForConditionalGeneration" if reads_images(architecture) else "ForCausalLM"
    return architecture.removesuffix(ARCHITECTURE_SUFFIX) + suffix


def _no_backbone(architecture: str) -> StartError:
    return StartError(
        f"the length value model is a {architecture}, but this SGLang has no {_causal_name(architecture)} to build it "
        "from; train a length value model on a backbone that SGLang serves."
    )
