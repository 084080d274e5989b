"""Vision-language backbones: images mixed with text-only rows, trained, saved and read back with the same values."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from lenvm import LengthValueModel
from lenvm.definitions import length_from_logit
from lenvm_lf.rows import RowError, parse_row
from tests.core.vision import TOWERS, vision_config

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SHOWN = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATES = {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_vl", "Qwen3VL": "qwen3_vl_nothink"}


def make_vision_base(world: Any, name: str, directory: Path) -> Any:
    """A random tiny vision-language model with its processor; returns the model."""
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    tokenizer.add_tokens(list(VISION_TOKENS), special_tokens=True)
    special: Any = tuple(tokenizer.convert_tokens_to_ids(token) for token in VISION_TOKENS)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = vision_config(name, len(tokenizer), special, **ends)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    model.save_pretrained(directory)
    video_class = "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor"
    getattr(transformers, f"{name}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(
            size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112}, patch_size=TOWERS[name]["patch_size"]
        ),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, video_class)(),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(directory)
    return model


def mixed_rows(tokenizer: Any, folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows in four ways of giving a prompt, each with its text as the model must see it in `seen`."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        picture = folder / f"{seed}_{i}.png"
        Image.new("RGB", (56 + 28 * (i % 3), 84), tuple(rng.randrange(256) for _ in range(3))).save(picture)
        system, ask = "<|im_start|>system\nBe brief.<|im_end|>\n", f"count to {i}<|im_end|>\n<|im_start|>assistant\n"
        shown, plain = f"{system}<|im_start|>user\n{SHOWN}{ask}", f"{system}<|im_start|>user\n{ask}"
        ids = tokenizer("and so on " * rng.randint(1, 6), add_special_tokens=False)["input_ids"]
        row = {"completion_token_ids": [*ids, tokenizer.eos_token_id], "finish_reason": "stop"}
        named = {"images": [picture.name]}
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"count to {i}"}]},
        ]
        rows += [
            row | named | {"prompt_token_ids": tokenizer(shown)["input_ids"], "seen": shown},
            row | named | {"messages": messages, "seen": shown},
            row | {"prompt_token_ids": tokenizer(plain)["input_ids"], "seen": plain},
            {
                "messages": [messages[0], {"role": "user", "content": f"<image>count to {i}"}],
                "completion": "and so on",
                "images": [str(picture)],
                "seen": shown,
            },
        ]
    return rows


def value_alone(model: Any, processor: Any, row: dict[str, Any], folder: Path) -> tuple[float, float]:
    """Both predicted lengths before the first token, one row at a time through transformers' own processor."""
    images = [Image.open(folder / path) for path in row.get("images", [])] or None
    inputs = processor(text=[row["seen"]], images=images, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    return length_from_logit(out.z[0, -1], model.lenvm.gamma).item(), model.predicted_length(out)[0, -1].item()


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_images_and_text_train_and_come_back(world: Any, name: str) -> None:
    from llamafactory.train.tuner import export_model  # after the hook

    base = world.root / f"base_{name}"
    fresh = make_vision_base(world, name, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = mixed_rows(tokenizer, world.data, 6, seed=0)
    held_out = mixed_rows(tokenizer, world.data, 3, seed=1)
    world.add(f"seen_{name}", rows)
    world.add(f"seen_{name}_held_out", held_out)
    changes = {
        "model_name_or_path": str(base),
        "dataset": f"seen_{name}",
        "eval_dataset": f"seen_{name}_held_out",
        "template": TEMPLATES[name],
        "do_eval": True,
        "do_predict": True,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "cutoff_len": 96,
    }
    if name == "Qwen3VL":
        changes |= {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    if name == "Qwen2_5_VL":
        changes |= {"finetuning_type": "lora", "lora_target": "all", "lora_rank": 4}
    run = world.fit(world.root / f"seen_{name}", **changes)
    if name == "Qwen2_5_VL":
        merged = world.root / f"seen_{name}_merged"
        keep = ("model_name_or_path", "finetuning_type", "template")
        settings = {key: changes[key] for key in keep} | {"stage": "lenvm", "infer_dtype": "float32"}
        export_model(settings | {"adapter_name_or_path": str(run), "export_dir": str(merged)})
    else:
        merged = run
    model, report = LengthValueModel.from_pretrained(merged, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(model).__name__ == f"{name}ForLengthValue"
    before = fresh.state_dict()
    moved = {key for key, value in model.state_dict().items() if key in before and not torch.equal(before[key], value)}
    assert any("language_model" in key for key in moved)
    assert any("visual" in key for key in moved) == (name == "Qwen3VL"), "the vision tower is frozen unless asked"
    processor = AutoProcessor.from_pretrained(merged)
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == list(range(1, len(held_out) + 1))
    for line in lines:
        wanted = value_alone(model.eval(), processor, held_out[line["row"] - 1], world.data)
        assert (line["value_length"], line["expected_length"]) == pytest.approx(wanted, rel=2e-3), line["row"]
    by_row = {line["row"]: line for line in lines}
    assert by_row[1]["value_length"] == pytest.approx(by_row[2]["value_length"], rel=1e-3), "ids or messages"
    assert by_row[1]["prompt"] == by_row[2]["prompt"]
    assert abs(by_row[1]["value_length"] - by_row[3]["value_length"]) > 1e-3, "the image is seen"


def test_rows_with_images_that_do_not_fit(world: Any, tmp_path: Path) -> None:
    for bad, message in (
        ({"images": "a.png"}, "`images` must be a list of file paths, got 'a.png'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "must be text, image or image_url"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be text or a list of parts, got 3"),
    ):
        with pytest.raises(RowError) as error:
            parse_row({"completion_token_ids": [1], "prompt_token_ids": [2], "finish_reason": "stop"} | bad)
        assert message in str(error.value)


@pytest.mark.slow
def test_images_that_cannot_be_used_are_bad_rows(world: Any) -> None:
    base = world.root / "base_bad_images"
    make_vision_base(world, "Qwen2VL", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    good = mixed_rows(tokenizer, world.data, 1, seed=2)[0]
    many = good["seen"].replace("<|image_pad|>", "<|image_pad|>" * 3)
    bad = [
        good | {"images": ["nowhere.png"]},
        good | {"images": []},
        good | {"prompt_token_ids": tokenizer(many)["input_ids"]},
        {"messages": [{"role": "user", "content": "hi"}], "completion": "x", "images": good["images"]},
    ]
    world.add("bad_images", [good, *bad])
    with pytest.raises(ValueError, match=r"4 of 5 rows cannot be used") as error:
        world.fit(world.root / "bad_images", model_name_or_path=str(base), dataset="bad_images", template="qwen2_vl")
    for part in (
        "row 2: an image cannot be read",
        "row 3: `prompt_token_ids` shows 1 image(s), `images` lists 0",
        "row 4: `prompt_token_ids` has 3 tokens for the image",
        "row 5: the messages hold 0 `<image>` for 1 image(s)",
    ):
        assert part in str(error.value)
    for changes, message in (
        ({"template": "qwen"}, "the template 'qwen' has no place for them; use the model's own"),
        (
            {"streaming": True, "dataloader_num_workers": 1, "lenvm_gamma": 0.9, "lenvm_max_length": 9},
            "does not support `streaming` with a vision-language model",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            world.fit(
                world.root / "bad_images",
                **{"model_name_or_path": str(base), "dataset": "bad_images", "template": "qwen2_vl", **changes},
            )
    world.add("seen_by_text_model", [good])
    with pytest.raises(ValueError, match=r"row 1: the row shows 1 image\(s\), but the model reads text only"):
        world.fit(world.root / "bad_images", dataset="seen_by_text_model")
