"""Tokenizer and files of the demo."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import prepare
import pytest
import tokenizer as demo_tokenizer
import world
from check import Completion, budget_statistics, length_statistics, percentile
from llamafactory.data.template import TEMPLATES
from transformers import AutoTokenizer, Qwen2Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    corpus = world.draw_corpus(0, prepare.TOKENIZER_DOCUMENTS)
    return demo_tokenizer.train_tokenizer(text for prompt, answer in corpus for text in (prompt.text, answer))


def test_any_text_survives_the_round_trip(tokenizer: Qwen2Tokenizer) -> None:
    rng = random.Random(0)
    texts = [prompt.write(rng) for prompt in world.draw_prompts(0, 100, "test")]
    for text in [*texts, "naïve café — 漢字 🙂\n\ttabs  and   spaces 12345 x+y", "", " leading"]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_words_and_numbers_are_single_tokens(tokenizer: Qwen2Tokenizer) -> None:
    for number in range(100):
        assert len(tokenizer.encode(f" {number}", add_special_tokens=False)) == 1
    rng = random.Random(1)
    for prompt in world.draw_prompts(1, 50, "test"):
        text = prompt.write(rng)
        assert len(tokenizer.encode(text, add_special_tokens=False)) <= 1.05 * len(re.findall(r"\w+|[^\w\s]", text)) + 1


def test_special_tokens(tokenizer: Qwen2Tokenizer) -> None:
    assert tokenizer.eos_token == demo_tokenizer.STOP
    assert tokenizer.pad_token == demo_tokenizer.PAD
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.bos_token is None
    assert tokenizer.encode("a<|im_end|>")[-1] == tokenizer.eos_token_id


def test_chat_template_is_what_llamafactory_writes(tokenizer: Qwen2Tokenizer) -> None:
    template = TEMPLATES["qwen3_nothink"]
    for prompt in world.draw_prompts(2, 20, "val"):
        messages = [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": "The end."}]
        asked, answered = template.encode_oneturn(tokenizer, messages)
        rendered = tokenizer.apply_chat_template(
            messages[:1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert asked == rendered
        assert answered[: answered.index(tokenizer.eos_token_id) + 1] == tokenizer.encode("The end.<|im_end|>")


def test_prepare_writes_files_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "TOKENIZER_DOCUMENTS", 1500)
    monkeypatch.setattr(prepare, "PROMPTS", {"train": 40, "val": 10, "test": 20})
    prepare.prepare(tmp_path, seed=0, documents=1500)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "base_init")
    assert loaded.chat_template == demo_tokenizer.CHAT_TEMPLATE
    config = json.loads((tmp_path / "base_init" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["eos_token_id"]) == (
        "qwen2",
        len(loaded),
        loaded.eos_token_id,
    )
    info = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
    assert (tmp_path / "data" / info["demo_base"]["file_name"]).is_file()
    rows = {
        split: [json.loads(line) for line in (tmp_path / f"prompts_{split}.jsonl").read_text().splitlines()]
        for split in prepare.PROMPTS
    }
    assert {split: len(found) for split, found in rows.items()} == prepare.PROMPTS
    for row in (row for found in rows.values() for row in found):
        assert ("answer" in row) == (row["kind"] == "problem")
        assert [message["role"] for message in row["messages"]] == ["user"]
    again = tmp_path / "again"
    prepare.prepare(again, seed=0, documents=1500)
    for name in (
        "prompts_test.jsonl",
        "data/base_train.jsonl",
        "base_init/tokenizer.json",
        "base_init/model.safetensors",
    ):
        assert (tmp_path / name).read_bytes() == (again / name).read_bytes(), (
            f"{name} must be the same for the same seed"
        )


def test_the_shipped_prompt_counts_serve_the_report() -> None:
    tests = world.draw_prompts(0, prepare.PROMPTS["test"], "test")
    assert len(tests) >= 150
    assert sum(prompt.answer is not None for prompt in tests) >= 80


def test_statistics() -> None:
    assert percentile([5, 1, 4, 2, 3], 0.5) == 3
    assert percentile([1, 2], 0.95) == 2
    groups = [
        [
            Completion("Answer: 1", 4, True),
            Completion("Answer: 2", 4, True),
            Completion("Wait. Answer: 1", 16, True),
            Completion("x", 16, False),
        ]
    ]
    lengths = length_statistics(groups)
    assert (lengths["mean length"], lengths["longest"], lengths["natural stops"]) == (10, 16, 0.75)
    assert budget_statistics(groups, ["1"]) == {
        "budget": 6.0,
        "sampled accuracy": 0.5,
        "accuracy cut at budget": 0.25,
        "accuracy at most budget": 0.5,
        "samples within budget": 0.5,
    }
