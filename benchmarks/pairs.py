"""Pairs of a base model and a length value model for speed: real shapes, a made-up tokenizer, no weights on disk.

The server fills the weights with random numbers (`--load-format dummy`), on the device itself. A speed does not depend
on them, except through the number of candidates that a row's probabilities leave, which the benchmarks set by top-k.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lenvm.bins import LengthBins
from lenvm.format import LenvmConfig

# hidden size, intermediate size, layers, heads, key-value heads, vocabulary, tied embeddings
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512, True),
    "small": (128, 352, 3, 4, 4, 1024, True),
    "medium": (256, 704, 6, 8, 4, 4096, True),
    "0.5b": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151_936, True),
    "3b": (2048, 11_008, 36, 16, 2, 151_936, True),
    "7b": (3584, 18_944, 28, 28, 4, 152_064, False),
}
"""Qwen2.5's shapes by name, and three for a CPU."""


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Bytes, then words that no text contains, up to the vocabulary's size."""
    words = ["<|endoftext|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<w{i}>" for i in range(vocabulary - len(words))]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words[:vocabulary])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def config(shape: str, context: int, dtype: str, vocabulary: int) -> dict[str, object]:
    hidden, intermediate, layers, heads, kv_heads, _, tied = SHAPES[shape]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "torch_dtype": dtype,
    }


def make_pair(folder: Path, base: str, value: str, context: int, dtype: str, longest: int = 4096) -> tuple[Path, Path]:
    """Write configs and tokenizers.

    Args:
        folder: where; it is made.
        base, value: names of `SHAPES`.
        context: longest sequence in tokens.
        dtype: of the weights.
        longest: last bin of the length head, in tokens.

    Returns:
        The directories of the base model and of the length value model.
    """
    vocabulary = SHAPES[base][5]
    words = tokenizer(vocabulary)
    places = folder / "base", folder / "lenvm"
    lenvm = LenvmConfig(gamma=0.999, bins=LengthBins.for_max_length(longest).centres)
    for place, shape in zip(places, (base, value), strict=True):
        place.mkdir(parents=True, exist_ok=True)
        block = config(shape, context, dtype, vocabulary)
        if place.name == "lenvm":
            block |= {"architectures": ["Qwen2ForLengthValue"], "lenvm": lenvm.to_json()}
        (place / "config.json").write_text(json.dumps(block, indent=2))
        words.save_pretrained(place)
    return places
