"""A small tokenizer for the demo world: byte-level BPE, every word of the world and every number 0..99 one token."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# ChatML without a default system prompt: what LlamaFactory's template `qwen3_nothink` writes, token for token
# (tests/demo checks it).
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# A word, or at most two digits, each with the space before it; runs of punctuation; runs of white space.
_PIECES = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"
_MIN_COUNT = 20


def train_tokenizer(texts: Iterable[str], max_length: int = 1024, max_vocab: int = 4096) -> PreTrainedTokenizerFast:
    """Train the tokenizer on ``texts``.

    Any text can be encoded (bytes are the fallback) and decodes to itself. Merges stop where no pair is seen
    :data:`_MIN_COUNT` times, well before ``max_vocab`` for the demo world, so that its words are whole tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab,
        min_frequency=_MIN_COUNT,
        special_tokens=[PAD, START, STOP],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    always = [f" {number}" for number in range(100)] + ["system\n", "user\n", "assistant\n"]
    tokenizer.train_from_iterator([*texts, *(always * _MIN_COUNT)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=STOP,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
