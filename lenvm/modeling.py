"""LengthValueModel: any causal LM or VLM backbone of transformers with a value head and a length head.

The class of a checkpoint is made from the backbone's own causal class, `Qwen2ForCausalLM` -> `Qwen2ForLengthValue`,
with the same parameter names, the heads beside them and no lm_head. It is an ordinary `PreTrainedModel`, so that
resume, sharding, PEFT, quantisation and export work as they do for any model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from lenvm.bins import LengthBins
from lenvm.format import ARCHITECTURE_SUFFIX, LenvmConfig, LenvmFormatError, read_lenvm_config, refuse_ablation
from lenvm.heads import LengthHead, LookaheadHead, MLPHead, ValueHead

HEAD_NAMES = ("value_head", "length_head")
"""The heads' submodule names: the prefixes of their keys in a checkpoint."""


@dataclass
class LengthValueOutput(ModelOutput):
    """What a length value model returns for each position (T positions, B bins).

    Attributes:
        z: [batch, T] float32 value logit; V = -sigmoid(z) (Eq. 8).
        length_logits: [batch, T, B] float32 logits of the remaining length's bins; None for a value-only checkpoint.
        past_key_values: the backbone's cache if one was asked for.
        hidden_states: the backbone's hidden states if they were asked for.
    """

    z: Tensor | None = None
    length_logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None


class LengthValueModel(nn.Module):
    """Base of every `<Backbone>ForLengthValue`; its `from_pretrained` loads any of them.

    Subclasses are made by `value_class`; `LengthValueModel.from_pretrained(DIR)` picks the right one.
    """

    lenvm: LenvmConfig
    value_head: ValueHead
    length_head: LengthHead | None
    lookahead_head: LookaheadHead | None

    # The pair below is mixed into real PreTrainedModel classes, whose constructor takes a config.
    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.lenvm = LenvmConfig.parse(getattr(config, "lenvm", None), f"the {type(self).__name__} config")
        model = cast(Any, self)
        setattr(self, model.base_model_prefix, AutoModel.from_config(config))
        hidden_size = config.get_text_config().hidden_size
        self.value_head = ValueHead(hidden_size)
        self.length_head = LengthHead(hidden_size, len(self.lenvm.bins)) if self.lenvm.has_length_head else None
        self.lookahead_head = None
        if self.lenvm.lookahead is not None:
            self.lookahead_head = lookahead_head(self.lenvm, hidden_size, config.get_text_config().vocab_size)
        model.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load a length value model.

        Args:
            pretrained_model_name_or_path: a directory in the format of `lenvm.format` (safetensors), or a hub name.
            **kwargs: as for transformers' `from_pretrained` (dtype, device_map, ...).

        Raises:
            LenvmFormatError: if it is not a length value model, its architecture does not fit its backbone, or weights
                are missing.
        """
        if cls is not LengthValueModel:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        config = kwargs.pop("config", None)
        if config is None:
            if Path(pretrained_model_name_or_path).is_dir():
                read_lenvm_config(pretrained_model_name_or_path)
            config = AutoConfig.from_pretrained(
                pretrained_model_name_or_path, trust_remote_code=kwargs.get("trust_remote_code", False)
            )
        where = str(pretrained_model_name_or_path)
        lenvm = refuse_ablation(LenvmConfig.parse(getattr(config, "lenvm", None), where), where)
        if lenvm.attached:
            raise LenvmFormatError(
                f"{where} is a head without a backbone, attached to the base model {lenvm.base_model!r}; load it with "
                "lenvm.attached.AttachedHead.from_pretrained(DIR, BASE)."
            )
        concrete = value_class(backbone_class(config))
        named = config.architectures or []
        if concrete.__name__ not in named:
            raise LenvmFormatError(
                f"{pretrained_model_name_or_path} names the architecture {list(named)}, but its backbone "
                f"({config.model_type}) makes a {concrete.__name__}; set `architectures` in its config.json to that."
            )
        return _load_whole(concrete, pretrained_model_name_or_path, "", *args, config=config, **kwargs)

    @classmethod
    def from_backbone(cls, backbone: str | Path | PretrainedConfig, lenvm: LenvmConfig, **kwargs: Any) -> Any:
        """A new length value model: the backbone's weights (its lm_head left behind) and fresh heads.

        Args:
            backbone: directory or hub name of a causal LM or VLM; a config gives random weights.
            lenvm: gamma, heads and bins.
            **kwargs: as for transformers' `from_pretrained`.

        Raises:
            LenvmFormatError: if the model type is unknown, or the files lack weights of the backbone.
        """
        if isinstance(backbone, PretrainedConfig):
            config = prepare_config(backbone, lenvm)
            return value_class(backbone_class(config))(config)
        config = AutoConfig.from_pretrained(backbone, trust_remote_code=kwargs.get("trust_remote_code", False))
        concrete = value_class(backbone_class(config))
        fresh = prepare_config(config, lenvm)
        return _load_whole(concrete, backbone, f"{concrete.base_model_prefix}.", config=fresh, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> LengthValueOutput:
        """Value and length logits at every position.

        Args:
            input_ids: [batch, T] int64.
            attention_mask: whatever the backbone takes.
            use_cache: return the backbone's cache.
            **kwargs: passed to the backbone (position_ids, past_key_values, pixel_values, ...).
        """
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **kwargs)
        hidden = out.last_hidden_state
        return LengthValueOutput(
            z=self.value_head(hidden),
            length_logits=None if self.length_head is None else self.length_head(hidden),
            past_key_values=out.get("past_key_values"),
            hidden_states=out.get("hidden_states"),
        )

    def lookahead(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Length distribution after each of K tokens, from the state before them (`LookaheadHead`).

        Args:
            hidden: [..., H] states of this model's backbone (`backbone(...).last_hidden_state`).
            tokens: [..., K] int64 next tokens.

        Returns:
            [..., K, B] float32 log-probabilities.

        Raises:
            LenvmFormatError: the checkpoint has no lookahead head.
        """
        if self.lookahead_head is None:
            raise LenvmFormatError("this checkpoint has no lookahead head; add one with `lenvm distill`.")
        source = cast(Any, self).get_input_embeddings().weight
        return torch.log_softmax(self.lookahead_head(hidden, tokens, source), dim=-1)

    @property
    def backbone(self) -> Any:
        """The backbone, whose `last_hidden_state` the heads read."""
        return getattr(self, cast(Any, self).base_model_prefix)

    def predicted_length(self, output: LengthValueOutput) -> Tensor:
        """Predicted remaining length in tokens at each position, [batch, T] float32: E[n] of the length distribution,
        or the inverted value (Eq. 5) for a value-only checkpoint."""
        if output.length_logits is not None:
            return self.lenvm.length_bins.expected(torch.log_softmax(output.length_logits, -1))
        return self.lenvm.value_space.length(cast(Tensor, output.z))

    @property
    def bins(self) -> LengthBins:
        """Bins of the length distribution."""
        return self.lenvm.length_bins

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MLPHead):
            text_config = cast(Any, self).config.get_text_config()
            module.reset_parameters(getattr(text_config, "initializer_range", 0.02))
        elif isinstance(module, LookaheadHead):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def get_output_embeddings(self) -> None:
        """There is no lm_head: nothing to tie, resize or quantise."""
        return None


def _load_whole(concrete: Any, where: str | Path, prefix: str, *args: Any, **kwargs: Any) -> Any:
    """`concrete.from_pretrained`, which would leave weights that a checkpoint lacks random, with a warning at most.

    Raises:
        LenvmFormatError: if a weight under `prefix` is missing.
    """
    asked = kwargs.pop("output_loading_info", False)
    model, report = concrete.from_pretrained(where, *args, output_loading_info=True, **kwargs)
    missing = sorted(key for key in report["missing_keys"] if key.startswith(prefix))
    if missing:
        raise LenvmFormatError(
            f"{where} lacks {len(missing)} weights of a {concrete.__name__}, {', '.join(missing[:3])} among them; its "
            "config.json and its safetensors files do not belong together."
        )
    return (model, report) if asked else model


def lookahead_head(lenvm: LenvmConfig, hidden_size: int, vocabulary: int) -> LookaheadHead:
    """A lookahead head of a block's shape, without its weights."""
    shape = lenvm.lookahead
    assert shape is not None, "the block has a lookahead head"
    tokens = vocabulary if shape.embedding == "table" else None
    return LookaheadHead(hidden_size, shape.rank, len(lenvm.bins), tokens)


def prepare_config(config: PretrainedConfig, lenvm: LenvmConfig) -> PretrainedConfig:
    """Write the `lenvm` block and the architecture's name into a backbone's config, in place; returns it."""
    config.lenvm = lenvm.to_json()
    config.architectures = [value_class(backbone_class(config)).__name__]
    return config


def backbone_class(config: PretrainedConfig) -> Any:
    """The causal class a config belongs to: image-text-to-text for VLMs, causal LM otherwise.

    Raises:
        LenvmFormatError: if transformers knows neither for this model type.
    """
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        mapping = cast(Any, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise LenvmFormatError(
        f"model type {getattr(config, 'model_type', '?')!r} is no causal LM or image-text model of this transformers "
        "version; a length value model needs such a backbone."
    )


# What a concrete class takes over from the causal class: how old checkpoints' keys map, and what it may be fed.
_INHERITED = ("_checkpoint_conversion_mapping", "config_class", "config", "input_modalities", "accepts_loss_kwargs")


@cache
def value_class(causal: type[PreTrainedModel]) -> Any:
    """`Qwen2ForCausalLM` -> `Qwen2ForLengthValue(LengthValueModel, Qwen2PreTrainedModel, GenerationMixin)`.

    GenerationMixin gives the class a `generation_config`, which hosts edit on every model they load and which
    carries the stop token ids; a length value model is never asked to generate.
    """
    parent = next(b for b in causal.__mro__[1:] if issubclass(b, PreTrainedModel) and b is not PreTrainedModel)
    stem = (
        causal.__name__.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration").removesuffix("LMHeadModel")
    )
    namespace: dict[str, Any] = {
        "base_model_prefix": "model",
        "_tied_weights_keys": None,
        "_keys_to_ignore_on_load_unexpected": [r"^lm_head\."],
        "__module__": __name__,
        "__doc__": f"{stem} backbone with a value head and a length head.",
    }
    for key in _INHERITED:
        if isinstance(causal.__dict__.get(key), (dict, type, tuple, list, str, bool)):
            namespace[key] = causal.__dict__[key]
    if TYPE_CHECKING:
        return LengthValueModel
    _share_key_mapping(causal.__name__, stem + ARCHITECTURE_SUFFIX)
    return type(stem + ARCHITECTURE_SUFFIX, (LengthValueModel, parent, GenerationMixin), namespace)


def _share_key_mapping(causal: str, ours: str) -> None:
    """Let a class of ours read the published checkpoints whose keys are older than the backbone's class.

    Checked against transformers 5.6 (mappings by model type, which ours has already) and 5.19 (some by the name of the
    causal class). Older versions have no such module and take `_checkpoint_conversion_mapping` from `_INHERITED`.
    """
    try:
        from transformers import conversion_mapping
    except ImportError:
        return
    mapping = conversion_mapping.get_checkpoint_conversion_mapping(causal)
    if mapping is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)
