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


def length_value_class(causal: type) -> type:
    """`Qwen2ForCausalLM` of SGLang -> `Qwen2ForLengthValue`: `forward` gives hidden states, `scores` reads the heads.

    Anything that holds its transformer body in `.model` and reads checkpoints in `load_weights` will do.
    """
    stem = causal.__name__.removesuffix("ForCausalLM")

    class LengthValue(causal):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
            body_config = copy.copy(config)
            body_config.tie_word_embeddings = True  # the constructor then makes no lm_head of its own
            super().__init__(body_config, quant_config=quant_config, prefix=prefix)
            for unused in ("lm_head", "logits_processor", "pooler"):
                if hasattr(self, unused):
                    delattr(self, unused)
            lenvm = LenvmConfig.parse(getattr(config, "lenvm", None), f"the {type(self).__name__} config")
            hidden_size = config.hidden_size
            self.value_head = ValueHead(hidden_size).float()
            self.length_head = LengthHead(hidden_size, len(lenvm.bins)).float() if lenvm.has_length_head else None
            if lenvm.lookahead is not None:
                self.lookahead_head = lookahead_head(lenvm, hidden_size, config.vocab_size).float()

        @torch.no_grad()
        def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: Any) -> Tensor:
            """[T] token ids and positions -> [T, H] hidden states, in the backbone's dtype."""
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
                        yield name, tensor

            super().load_weights(body())
            if missing:
                raise StartError(
                    f"the length value model lacks the parameters {sorted(missing)}; train or export it again."
                )

    LengthValue.__name__ = LengthValue.__qualname__ = stem + ARCHITECTURE_SUFFIX
    return LengthValue


def register_architecture(architecture: str) -> None:
    """Make SGLang's model registry know `<X>ForLengthValue`, built from its `<X>ForCausalLM`.

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


def _causal_name(architecture: str) -> str:
    return architecture.removesuffix(ARCHITECTURE_SUFFIX) + "ForCausalLM"


def _no_backbone(architecture: str) -> StartError:
    return StartError(
        f"the length value model is a {architecture}, but this SGLang has no {_causal_name(architecture)} to build it "
        "from; train a length value model on a backbone that SGLang serves."
    )
