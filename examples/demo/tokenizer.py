"""A small tokenizer for the demo world: Qwen2's byte-level BPE, with words and the numbers 0..99 as single tokens.

It is a ``Qwen2Tokenizer``, because the base model is a Qwen2: transformers 5.19 loads whatever tokenizer lies beside a
model of that type as one, with Qwen2's own way of cutting text into pieces. That way cuts numbers into digits, so the
numbers are added tokens (as some models' vocabularies have them), which are found before the text is cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

PAD, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
NUMBERS = [f" {number}" for number in range(100)]

# ChatML without a default system prompt: what LlamaFactory's template `qwen3_nothink` writes, token for token
# (tests/demo checks it).
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_MIN_COUNT = 20


def train_tokenizer(texts: Iterable[str], max_length: int = 1024, max_vocab: int = 4096) -> Qwen2Tokenizer:
    """Train the tokenizer on ``texts``.

    Any text can be encoded (bytes are the fallback) and decodes to itself. Merges stop where no pair is seen
    :data:`_MIN_COUNT` times, well before ``max_vocab`` for the demo world, so that its words are whole tokens.
    """
    qwen2 = Qwen2Tokenizer().backend_tokenizer  # with no vocabulary: its normalizer, its pieces and its decoder
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = qwen2.normalizer, qwen2.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab,
        min_frequency=_MIN_COUNT,
        special_tokens=[PAD, START, STOP],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    roles = ["system", "user", "assistant"] * _MIN_COUNT
    tokenizer.train_from_iterator([*texts, *roles], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    fast = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token=None,
        eos_token=STOP,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.add_tokens([AddedToken(number, normalized=False) for number in NUMBERS])
    fast.chat_template = CHAT_TEMPLATE
    return fast
