"""Write everything the demo starts from: tokenizer, untrained base model, training text, prompts.

    python examples/demo/prepare.py OUT [--seed 0] [--documents 45000]

    OUT/base_init/            Qwen2-architecture model with random weights, and the tokenizer
    OUT/data/                 base_train.jsonl (ShareGPT rows) and dataset_info.json for LlamaFactory
    OUT/prompts_train.jsonl   prompts whose sampled completions train the length value model
    OUT/prompts_val.jsonl     its validation prompts
    OUT/prompts_test.jsonl    prompts of the report; no model sees them before

The four sets of prompts (base text, train, val, test) are disjoint: see ``world.split_of``.
Runs in the train environment.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from tokenizer import train_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed
from world import Prompt, draw_corpus, draw_prompts

DOCUMENTS = 45_000
PROMPTS = {"train": 1200, "val": 150, "test": 200}
TOKENIZER_DOCUMENTS = 10_000
MAX_LENGTH = 1024


def write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def prompt_row(prompt: Prompt, prompt_id: str) -> dict[str, object]:
    """A line of a prompt file: id, messages, kind, and the answer where it can be checked."""
    row: dict[str, object] = {
        "id": prompt_id,
        "messages": [{"role": "user", "content": prompt.text}],
        "kind": prompt.kind,
    }
    if prompt.answer is not None:
        row["answer"] = prompt.answer
    return row


def base_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """An untrained Qwen2 of about 0.7 million parameters, float32."""
    set_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.06,  # with 0.02, the default, copying from the prompt is learned several times later
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config).to(torch.float32)


def prepare(out: Path, seed: int, documents: int) -> None:
    corpus = list(draw_corpus(seed, documents))
    write_jsonl(
        out / "data" / "base_train.jsonl",
        (
            {"messages": [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": answer}]}
            for prompt, answer in corpus
        ),
    )
    roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {
        "demo_base": {
            "file_name": "base_train.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": roles,
        }
    }
    (out / "data" / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    for split, count in PROMPTS.items():
        prompts = draw_prompts(seed, count, split)
        write_jsonl(
            out / f"prompts_{split}.jsonl", (prompt_row(prompt, f"{split}-{i:04d}") for i, prompt in enumerate(prompts))
        )

    tokenizer = train_tokenizer(
        (text for prompt, answer in corpus[:TOKENIZER_DOCUMENTS] for text in (prompt.text, answer)), MAX_LENGTH
    )
    model = base_model(tokenizer, seed)
    model.save_pretrained(out / "base_init")
    tokenizer.save_pretrained(out / "base_init")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    prompts_written = sum(PROMPTS.values())
    print(
        f"{out}: {documents} documents, {prompts_written} prompts, {len(tokenizer)} tokens, {parameters:,} parameters"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the world, of the weights and of the prompts (default 0)"
    )
    parser.add_argument(
        "--documents", type=int, default=DOCUMENTS, help=f"documents the base model is trained on (default {DOCUMENTS})"
    )
    arguments = parser.parse_args()
    if arguments.documents < TOKENIZER_DOCUMENTS:
        parser.error(
            f"--documents must be at least {TOKENIZER_DOCUMENTS}, got {arguments.documents}: "
            "the tokenizer is trained on that many"
        )
    prepare(arguments.out, arguments.seed, arguments.documents)


if __name__ == "__main__":
    main()
