"""The stage on other backbones than Qwen2 (which every other test trains): two steps, saved, read back, same values."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from lenvm import LengthValueModel, LenvmConfig
from lenvm.definitions import length_from_logit
from lenvm_lf.checkpoint import load_model
from tests.core.test_modeling import BACKBONES, SMALL


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "Qwen2"])
def test_backbone_trains_and_comes_back(world: Any, name: str) -> None:
    base = world.root / f"base_{name}"
    torch.manual_seed(0)
    changes = {"vocab_size": len(world.tokenizer), "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **BACKBONES[name], **changes})
    fresh = getattr(transformers, f"{name}ForCausalLM")(config)
    fresh.save_pretrained(base)
    world.tokenizer.save_pretrained(base)
    run = world.fit(
        world.root / f"backbone_{name}",
        model_name_or_path=str(base),
        max_steps=2,
        learning_rate=1e-2,
        eval_dataset="held_out",
        do_eval=True,
        do_predict=True,
    )
    assert json.loads((run / "config.json").read_text())["architectures"] == [f"{name}ForLengthValue"]
    model, report = LengthValueModel.from_pretrained(run, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    # every weight of the backbone and of the heads was trained; an expert may have had no token
    before = fresh.state_dict()
    still = {
        key
        for key, value in model.state_dict().items()
        if key in before and torch.equal(before[key], value) and ".experts." not in key
    }
    assert not still
    # what the trainer's model predicted in padded batches, one row at a time from the files
    for line in map(json.loads, (run / "predictions.jsonl").read_text().splitlines()):
        with torch.no_grad():
            out = model.eval()(torch.tensor([world.eval_rows[line["row"] - 1]["prompt_token_ids"]]))
        assert line["value_length"] == pytest.approx(
            length_from_logit(out.z[0, -1], model.lenvm.gamma).item(), rel=1e-3
        )
        assert line["expected_length"] == pytest.approx(model.predicted_length(out)[0, -1].item(), rel=1e-3)


def test_a_lookahead_head_is_not_trained_past() -> None:
    """Training moves the states that the head was distilled on."""
    shape = {"lookahead": {"rank": 4}, "heads": ["value", "length", "lookahead"], "bins": [1, 2, 3], "gamma": 0.9}
    finetuning_args = SimpleNamespace(lenvm_config=LenvmConfig.parse(shape, "here"))
    loader = SimpleNamespace(load_config=lambda _: transformers.Qwen2Config(**SMALL))
    model_args = SimpleNamespace(model_name_or_path="runs/lookahead")
    with pytest.raises(ValueError, match="runs/lookahead has a lookahead head"):
        load_model(loader, None, None, model_args, finetuning_args, is_trainable=True)  # type: ignore[arg-type]
