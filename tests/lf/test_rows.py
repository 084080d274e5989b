"""Rows on disk -> token ids, targets and counts, without a model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lenvm_lf import rows as rows_module
from lenvm_lf.collator import IGNORE, DenseReturnCollator
from lenvm_lf.data import by_length, foreign_prompts, shared_prompts, split_by_prompt, usable_rows
from lenvm_lf.processor import LONG_PROMPT, LengthValueProcessor
from lenvm_lf.rows import RowError, SampledRowConverter, load_lines, parse_row

STOP = 2


def row(prompt: int = 3, length: int = 4, finish: str = "stop", **changes: Any) -> dict[str, Any]:
    ids = [*range(10, 10 + length - 1), STOP if finish == "stop" else 9]
    return {
        "prompt_token_ids": list(range(100, 100 + prompt)),
        "completion_token_ids": ids,
        "finish_reason": finish,
    } | changes


def processed(raw: list[Any], cutoff: int = 64, template: Any = None, tokenizer: Any = None) -> datasets.Dataset:
    """Through converter and processor, as the host calls them."""
    lines = [item if isinstance(item, str) else json.dumps(item) for item in raw]
    data = datasets.Dataset.from_dict({rows_module.LINE: lines, rows_module.ROW: list(range(1, len(lines) + 1))})
    aligned = data.map(SampledRowConverter(None, None), remove_columns=data.column_names)
    processor = LengthValueProcessor(template, tokenizer, cutoff)
    return aligned.map(processor.preprocess_dataset, batched=True, remove_columns=aligned.column_names)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12), st.booleans()), min_size=1, max_size=5),
    st.integers(9, 16),
)
def test_every_state_gets_its_remaining_length(shapes: list[tuple[int, int, bool]], cutoff: int) -> None:
    processor = LengthValueProcessor(None, None, cutoff)
    raw = [row(p, n, "length" if cut else "stop") for p, n, cut in shapes]
    examples = [SampledRowConverter(None, None)(r) for r in raw]
    columns = {key: [e[key] for e in examples] for key in examples[0]}
    out = processor.preprocess_dataset(columns)
    batch = DenseReturnCollator(pad_token_id=0, multiple_of=4)(
        [dict(zip(out, v, strict=True)) for v in zip(*out.values(), strict=True)]
    )
    assert batch["input_ids"].shape[1] % 4 == 0
    for i, (prompt, length, cut) in enumerate(shapes):
        full = raw[i]["prompt_token_ids"] + raw[i]["completion_token_ids"]
        expected = [(prompt - 1 + t, length - t) for t in range(length) if prompt - 1 + t < cutoff]
        found = [(int(p), int(batch["labels"][i, p])) for p in (batch["labels"][i] != IGNORE).nonzero()[:, 0]]
        assert found == expected, "state s_t sits at the last token it has seen and has L - t to come"
        width = int(batch["attention_mask"][i].sum())
        assert batch["input_ids"][i, :width].tolist() == full[:width]
        assert width == min(cutoff, prompt + length - 1), "the last completion token leads to no target state"
        assert batch["censored"][i, [p for p, _ in expected]].tolist() == [cut] * len(expected)
        assert not batch["censored"][i, width:].any()


def test_prompt_is_never_cut_and_a_long_completion_keeps_its_length(caplog: pytest.LogCaptureFixture) -> None:
    data = processed([row(5, 30), row(12, 3), row(10, 3)], cutoff=10)
    assert data["skip"] == ["", LONG_PROMPT, ""]
    with caplog.at_level(logging.WARNING):
        kept = usable_rows(data, "training", 512, 10, False)
    assert kept["row"] == [1, 3]
    assert "1 of 3 rows dropped, their prompt is longer than `cutoff_len` 10" in caplog.text
    labels = DenseReturnCollator(0)([kept[0], kept[1]])["labels"]
    assert labels[0].tolist() == [IGNORE] * 4 + [30, 29, 28, 27, 26, 25]
    assert labels[1].tolist() == [IGNORE] * 9 + [3], "a prompt of exactly cutoff_len still shows its first state"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "`finish_reason` must be `stop` or `length`, got None"),
        ({"finish_reason": "abort"}, "got 'abort'"),
        ({"completion_token_ids": []}, "`completion_token_ids` is empty"),
        ({"prompt_token_ids": []}, "`prompt_token_ids` is empty"),
        ({"prompt_token_ids": None}, "`prompt_token_ids` must be a list of token ids, got None"),
        ({"completion_token_ids": "1 2"}, "must be a list of token ids, got '1 2'"),
        ({"completion_token_ids": [1, 2.0]}, "must be a list of token ids"),
        ({"completion_token_ids": [1, True]}, "must be a list of token ids"),
        ({"completion_token_ids": [1, -3]}, "holds -3, which is no token id"),
        ({"completion_token_ids": [1, 2**40]}, "which is no token id"),
        ({"completion": 5}, "`completion` must be text, got 5"),
        ({"messages": "hi"}, "`messages` must be a list of objects"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "the role 'wizard'"),
    ],
)
def test_bad_row_says_what_is_wrong(bad: dict[str, Any], message: str) -> None:
    wrong = row() | bad if bad else {k: v for k, v in row().items() if k != "finish_reason"}
    with pytest.raises(RowError) as error:
        parse_row(wrong)
    assert message in str(error.value)


def test_row_without_ids_or_text_is_bad() -> None:
    with pytest.raises(RowError, match="a row needs `prompt_token_ids` and `completion_token_ids`, or"):
        parse_row({"messages": [{"role": "user", "content": "x"}], "completion": ""})
    with pytest.raises(RowError, match="must be a JSON object, got 5"):
        parse_row(5)


def test_bad_rows_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good: list[Any] = [row(meta={"k": i if i % 2 else str(i)}) for i in range(57)]
    raw = [*good[:10], "{not json", *good[10:], row(completion_token_ids=[700, STOP])]
    path = tmp_path / "x.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in raw))
    loaded = load_lines("json", data_files=[str(path)])
    assert len(loaded) == 59
    data = processed(raw)
    with caplog.at_level(logging.WARNING):
        kept = usable_rows(data, "training", 512, 64, False)
    assert len(kept) == 57
    assert "2 of 59 rows cannot be used" in caplog.text
    assert "row 11: not JSON" in caplog.text
    assert "row 59: token id 700 is out of the vocabulary of 512" in caplog.text
    with pytest.raises(ValueError, match="That is more than 5%"):
        usable_rows(processed([*good[:20], *raw[10:11] * 2]), "training", 512, 64, False)
    with pytest.raises(ValueError, match="has no usable row"):
        usable_rows(processed([row(60)] * 3, cutoff=8), "training", 512, 8, False)


def test_files_of_one_array_and_empty_files(tmp_path: Path) -> None:
    array = tmp_path / "x.json"
    array.write_text(json.dumps([row(), row()]))
    assert load_lines("json", data_files=[str(array)])[rows_module.ROW] == [1, 2]
    empty = tmp_path / "e.jsonl"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="no rows; sample some completions first"):
        load_lines("json", data_files=[str(empty)])


def test_not_tokenised_for_this_stage() -> None:
    with pytest.raises(ValueError, match="was not tokenised for stage `lenvm`"):
        usable_rows(datasets.Dataset.from_dict({"input_ids": [[1]]}), "training", 512, 64, False)


def test_split_shares_no_prompt() -> None:
    data = processed([row(2 + i % 7, 3 + i % 4) for i in range(70)])
    train, held_out = split_by_prompt(data, 0.2, seed=3)
    assert len(train) + len(held_out) == 70
    assert len(held_out) == 20, "two of seven prompts are the nearest to 14 rows from above"
    assert shared_prompts(train, held_out) == 0
    assert shared_prompts(train, data) == len(train)
    again = split_by_prompt(data, 0.2, seed=3)[1]
    assert again["row"] == held_out["row"]
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        split_by_prompt(data, 69, seed=3)


def test_prompts_of_another_tokenizer_are_noticed(world: Any) -> None:
    own = list(world.train_rows[:12])
    data = processed(own)
    prompts = len(set(data["prompt_hash"]))
    assert prompts >= 3
    assert foreign_prompts(data, world.tokenizer) == (0, prompts)
    letters = [world.tokenizer.encode(c)[0] for c in "count"]  # the letters of a word that is one token
    cut = [r | {"prompt_token_ids": r["prompt_token_ids"][:3] + letters + r["prompt_token_ids"][4:]} for r in own]
    assert foreign_prompts(processed(cut), world.tokenizer) == (prompts, prompts)
    assert foreign_prompts(processed(cut), world.tokenizer, most=2) == (2, 2)


def test_censored_rows_can_be_dropped_and_sorted() -> None:
    data = processed([row(3, 9), row(3, 5, "length"), row(3, 2)])
    assert usable_rows(data, "training", 512, 64, True)["row"] == [1, 3]
    assert by_length(data)["row"] == [3, 2, 1]


def test_text_rows_equal_token_id_rows(world: Any) -> None:
    """The template's route (stop token once, its suffix gone) gives the ids a server would have returned."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    template = get_template_and_fix_tokenizer(world.tokenizer, DataArguments(template="qwen"))
    source = list(world.train_rows[:12])
    system = {"role": "system", "content": "You are a helpful assistant."}
    text_only = []
    for r in source:
        messages = [system, *r["messages"]]
        chat = world.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        r = r | {"prompt_token_ids": world.tokenizer(chat, add_special_tokens=False)["input_ids"], "messages": messages}
        text_only.append({k: r[k] for k in ("messages", "completion", "finish_reason")})
        source[len(text_only) - 1] = r
    by_text = processed(text_only, 128, template, world.tokenizer)
    by_ids = processed(source, 128, template, world.tokenizer)
    for key in ("input_ids", "prompt_length", "completion_length", "censored", "skip"):
        assert by_text[key] == by_ids[key], key
    assert any(by_ids["censored"])
    # a completion whose text carries the stop token already ends there, once
    doubled = text_only[0] | {"completion": text_only[0]["completion"] + "<|im_end|>\n", "finish_reason": "stop"}
    twice = processed([doubled], 128, template, world.tokenizer)
    assert twice["completion_length"][0] == len(world.tokenizer(text_only[0]["completion"])["input_ids"]) + 1


# What the published chat templates do with one user message: Qwen2.5 has a system prompt of its own, Qwen3 an empty
# thought where thinking is off.
TURN = "<|im_start|>{{messages[-1]['role']}}\n{{messages[-1]['content']}}<|im_end|>\n{{'<|im_start|>assistant\n'}}"
CHATS = {
    "qwen": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
    "You are a helpful assistant.<|im_end|>\n{% endif %}" + TURN,
    "qwen3": TURN + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
}


@pytest.mark.parametrize(("name", "thinking"), [("qwen", None), ("qwen3", True), ("qwen3", False)])
def test_prompts_are_those_of_the_chat_template(world: Any, name: str, thinking: bool | None) -> None:
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.base)
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template=name, enable_thinking=thinking))
    messages = [{"role": "user", "content": "count to three"}]
    options = {} if thinking is None else {"enable_thinking": thinking}
    chat = tokenizer.apply_chat_template(
        messages, chat_template=CHATS[name], tokenize=False, add_generation_prompt=True, **options
    )
    wanted = tokenizer(chat, add_special_tokens=False)["input_ids"]
    texts = ["<think>\nso\n</think>\n\none two" if thinking else "one two", "so on"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = [
        {"messages": messages, "completion": texts[0]},
        {"messages": messages, "completion_token_ids": [*ids[1], tokenizer.eos_token_id], "finish_reason": "stop"},
    ]
    data = processed(rows, 128, template, tokenizer)
    assert data["skip"] == ["", ""]
    for i in range(2):
        assert data["input_ids"][i] == wanted + ids[i]
        assert (data["prompt_length"][i], data["completion_length"][i]) == (len(wanted), len(ids[i]) + 1)


def test_text_rows_that_cannot_be_used(world: Any) -> None:
    processor = LengthValueProcessor(None, None, 64)
    example = {
        "_prompt": [{"role": "user", "content": "x"}],
        "_response": [],
        "_images": None,
        "_system": "",
        "_tools": "",
    }
    with pytest.raises(ValueError, match="odd number of prompt messages"):
        processor.encode(example)
    with pytest.raises(ValueError, match="the completion is empty"):
        processor.encode(example | {"_response": [{"role": "assistant", "content": ""}]})
    with pytest.raises(ValueError, match=r"the row shows 1 image\(s\), but the model reads text only"):
        processor.encode(example | {"_images": ["x.png"]})
    with pytest.raises(ValueError, match="reads text and images, got videos or audio"):
        processor.encode(example | {"_videos": ["x.mp4"]})


def test_collator_types() -> None:
    batch = DenseReturnCollator(7)(
        [
            {"input_ids": np.array([1, 2], np.int32), "prompt_length": 2, "completion_length": 5, "censored": False}
            | {"prompt_hash": -8}
        ]
    )
    assert batch["prompt"].tolist() == [-8]
    assert {k: v.dtype for k, v in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "censored": torch.bool,
        "prompt": torch.int64,
    }
