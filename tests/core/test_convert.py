"""`lenvm convert`: files made in the published layout, both directions, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lenvm import LengthBins, LengthValueModel, LenvmConfig
from lenvm.cli import main
from tests.core.test_modeling import BACKBONES, SMALL

runner = CliRunner()
IDS = torch.tensor([[5, 9, 11, 3]])


def published(directory: Path, name: str = "Qwen2", **save: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """As LlamaFactory's value-head wrapper leaves it: a causal LM, and the head in a file of its own."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SMALL, **BACKBONES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.save_pretrained(directory, **save)
    hidden = SMALL["hidden_size"]
    head = {
        "v_head.fc.weight": torch.randn(hidden, hidden) / 6,
        "v_head.fc.bias": torch.randn(hidden),
        "v_head.summary.weight": torch.randn(1, hidden),
        "v_head.summary.bias": torch.randn(1),
    }
    save_file(head, directory / "value_head.safetensors", metadata={"format": "pt"})
    (directory / "tokenizer.json").write_text("{}")
    (directory / "trainer_state.json").write_text("{}")
    return model, head


def convert(*words: Any) -> Any:
    return runner.invoke(main, ["convert", *map(str, words)])


@pytest.mark.parametrize(("name", "save"), [("Qwen2", {}), ("Llama", {"max_shard_size": "20KB"})])
def test_published_checkpoint_becomes_a_length_value_model(name: str, save: dict[str, Any], tmp_path: Path) -> None:
    """Tied and untied, one file and shards (of which the lm_head's own is left out)."""
    backbone, head = published(tmp_path / "theirs", name, **save)
    done = convert(tmp_path / "theirs", tmp_path / "ours", "--gamma", "0.997", "--base-model", "Qwen/B")
    assert done.exit_code == 0, done.output
    assert ((tmp_path / "ours/model.safetensors.index.json").is_file()) == bool(save)
    model, report = LengthValueModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.lenvm == LenvmConfig(gamma=0.997, heads=("value",), base_model="Qwen/B")
    with torch.no_grad():
        h = backbone.model(IDS).last_hidden_state
        inner = torch.nn.functional.silu(h @ head["v_head.fc.weight"].T + head["v_head.fc.bias"])
        z = inner @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"]
        assert torch.allclose(model.eval()(IDS).z, z, atol=1e-5)
    assert (tmp_path / "ours/tokenizer.json").is_file()
    assert not (tmp_path / "ours/trainer_state.json").exists()
    # and back: the same tensors, but for the lm_head
    back = convert(tmp_path / "ours", tmp_path / "back", "--to", "published")
    assert back.exit_code == 0, back.output
    assert "gamma is 0.997" in back.output and ("no lm_head" in back.output) == (name == "Llama")
    again = load_file(tmp_path / "back/value_head.safetensors")
    assert set(again) == set(head) and all(torch.equal(again[key], head[key]) for key in head)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["architectures"] == [f"{name}ForCausalLM"] and "lenvm" not in config
    plain = type(backbone).from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert torch.equal(plain.model(IDS).last_hidden_state, h)


def test_length_head_is_left_behind_aloud(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = transformers.Qwen2Config(**SMALL, **BACKBONES["Qwen2"])
    lenvm = LenvmConfig(gamma=0.98, bins=LengthBins.for_max_length(20).centres)
    LengthValueModel.from_backbone(config, lenvm).save_pretrained(tmp_path / "ours")
    done = convert(tmp_path / "ours", tmp_path / "theirs", "--to", "published")
    assert done.exit_code == 0 and "the length distribution is left behind" in done.output
    keys = set(load_file(tmp_path / "theirs/model.safetensors"))
    assert keys and not any("head" in key for key in keys)


def test_what_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "theirs"
    _, head = published(source)
    given = ["--gamma", "0.997", "--base-model", "B"]

    def refused(message: str, *words: Any) -> None:
        done = convert(*words)
        assert done.exit_code == 1
        assert message in " ".join(done.output.split()), done.output

    refused("give --gamma and --base-model", source, tmp_path / "o")
    refused("leave them out", source, tmp_path / "o", "--to", "published", "--gamma", "0.9")
    refused("gamma: Input should be less than 1", source, tmp_path / "o", "--gamma", "1.5", "--base-model", "B")
    refused("is not a length value model", source, tmp_path / "o", "--to", "published")
    refused("is there already and not empty", source, source, *given)
    refused("there is no", tmp_path / "nowhere", tmp_path / "o", *given)
    save_file({**head, "v_head.fc.weight": torch.zeros(3, 3)}, source / "value_head.safetensors")
    refused("v_head.fc.weight must have the shape (32, 32), got (3, 3)", source, tmp_path / "o", *given)
    save_file({"v_head.summary.weight": torch.zeros(1, 32)}, source / "value_head.safetensors")
    refused("must hold v_head.fc.weight", source, tmp_path / "o", *given)
    (source / "value_head.safetensors").rename(source / "value_head.bin")
    refused("pickled weights are not read", source, tmp_path / "o", *given)
    save_file(head, source / "value_head.safetensors")
    weights = load_file(source / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    refused("lacks model.norm.weight; is it complete?", source, tmp_path / "o", *given)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refused("has no model.safetensors; weights must be safetensors", source, tmp_path / "o", *given)
    assert not (tmp_path / "o").exists(), "nothing is written before everything is checked"
