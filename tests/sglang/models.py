"""Tiny pairs of a base model and a length value model, with random weights that make their opinions strong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from lenvm.attached import base_hash, save_attached
from lenvm.bins import LengthBins
from lenvm.format import LenvmConfig, LookaheadShape, Spread
from lenvm.heads import LookaheadHead
from lenvm.modeling import LengthValueModel, backbone_class
from tests.core.vision import TOWERS, vision_config

VOCABULARY = 320
THINK, THINK_END = 3, 4
FIRST_WORD = 5
"""Tokens from here on are no special ones."""
CONTEXT = 512
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SHOWN = "<|vision_start|><|image_pad|><|vision_end|>"
VISION_TEMPLATE = TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    f"{{{{ c['text'] }}}}{{% else %}}{SHOWN}{{% endif %}}{{% endfor %}}{{% endif %}}",
)


def tokenizer(extra: str = "") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; `extra` text changes its merges."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([f"the quick brown fox says hello world yes no maybe {extra}"] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    return fast


def shape(family: type[PretrainedConfig], eos: int) -> PretrainedConfig:
    """A two-layer config."""
    extra = {"head_dim": 16} if family is Qwen3Config else {}
    return family(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        eos_token_id=eos,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.2,
        **extra,
    )


def make_pair(
    directory: Path, base: type[PretrainedConfig], value: type[PretrainedConfig], heads: int = 2, seed: int = 0
) -> Path:
    """Write `directory`/base and `directory`/lenvm; `heads` 1 makes a value-only LenVM."""
    torch.manual_seed(seed)
    words = tokenizer()
    eos = words.convert_tokens_to_ids("<|im_end|>")
    model = backbone_class(shape(base, eos))(shape(base, eos))
    with torch.no_grad():
        model.lm_head.weight[eos] *= 0.3  # answers of random weights should not stop at once
    model.save_pretrained(directory / "base")
    bins = LengthBins.for_max_length(64).centres if heads == 2 else ()
    names = ("value", "length")[:heads]
    spread = Spread(log_n_hat=(0.5, 3.0), shift=(0.1, -0.2), sigma=(0.3, 0.6)) if heads == 1 else None
    config = LenvmConfig(gamma=0.97, bins=bins, heads=names, spread=spread)
    lenvm = LengthValueModel.from_backbone(shape(value, eos), config)
    for head in (lenvm.value_head, lenvm.length_head):
        if head is not None:
            torch.nn.init.normal_(head.w2, std=0.4)
    lenvm.save_pretrained(directory / "lenvm")
    for part in ("base", "lenvm"):
        words.save_pretrained(directory / part)
    return directory


def make_vision_pair(directory: Path, name: str, value: str | None = None) -> Path:
    """Write `directory`/base, a `<name>ForConditionalGeneration`, and `directory`/lenvm of the same or another family,
    with their processors."""
    words = tokenizer()
    words.add_tokens(list(VISION_TOKENS), special_tokens=True)
    words.chat_template = VISION_TEMPLATE
    special: Any = tuple(words.convert_tokens_to_ids(list(VISION_TOKENS)))
    eos = words.convert_tokens_to_ids("<|im_end|>")

    def config(family: str) -> Any:
        # wide enough that images matter
        made = vision_config(family, len(words), special, eos_token_id=eos, pad_token_id=0, initializer_range=0.2)
        made.vision_config.initializer_range = 0.2
        made.tie_word_embeddings = made.text_config.tie_word_embeddings = False
        return made

    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config(name))
    with torch.no_grad():
        model.lm_head.weight[eos] *= 0.3  # answers of random weights should not stop at once
        model.lm_head.weight[list(special)] = 0.0  # nor hold tokens that stand for an image
    model.save_pretrained(directory / "base")
    lenvm = LenvmConfig(gamma=0.97, bins=LengthBins.for_max_length(64).centres)
    values = LengthValueModel.from_backbone(config(value or name), lenvm)
    for head in (values.value_head, values.length_head):
        torch.nn.init.normal_(head.w2, std=0.4)
    values.save_pretrained(directory / "lenvm")
    videos = "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor"
    processor = getattr(transformers, f"{name}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(
            size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112}, patch_size=TOWERS[name]["patch_size"]
        ),
        tokenizer=words,
        video_processor=getattr(transformers, videos)(),
        chat_template=VISION_TEMPLATE,
    )
    for part in ("base", "lenvm"):
        processor.save_pretrained(directory / part)
    return directory


def make_attached(directory: Path, base: Path, embedding: str = "projection") -> Path:
    """A head with random weights, attached to a base model."""
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(base)
    bins = LengthBins.for_max_length(64).centres
    tokens = VOCABULARY if embedding == "table" else None
    head = LookaheadHead(config.hidden_size, 24, len(bins), tokens, source_size=config.hidden_size)
    head.reset_parameters()
    torch.nn.init.normal_(head.w2, std=0.6)
    shape = LookaheadShape(rank=24, embedding=embedding, source=None if tokens else "model.embed_tokens.weight")
    lenvm = LenvmConfig(gamma=0.97, heads=("lookahead",), bins=bins, lookahead=shape, attached=True,
                        base_hash=base_hash(base), hidden_size=config.hidden_size, base_model="tiny")  # fmt: skip
    save_attached(directory, lenvm, head, base)
    return directory


def make_lookahead(directory: Path, lenvm_directory: Path) -> Path:
    """A LenVM with one more head, of random weights."""
    torch.manual_seed(2)
    before = LengthValueModel.from_pretrained(lenvm_directory)
    block = {**before.lenvm.to_json(), "heads": ("value", "length", "lookahead"), "lookahead": {"rank": 24}}
    model = LengthValueModel.from_backbone(before.config, LenvmConfig.parse(block, "here"))
    model.load_state_dict(before.state_dict(), strict=False)
    torch.nn.init.normal_(model.lookahead_head.w2, std=0.6)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def prompts(count: int, seed: int, shared: int = 0) -> list[list[int]]:
    """Random prompts without special tokens; the last third shares a prefix of `shared` tokens."""
    draw = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(FIRST_WORD, VOCABULARY - 1) for _ in range(n)]

    prefix = tokens(shared)
    alone = count - count // 3 if shared else count
    return [tokens(draw.randrange(2, 60)) for _ in range(alone)] + [prefix + tokens(5) for _ in range(count - alone)]


FAMILIES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
