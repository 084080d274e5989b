"""LengthValueModel over several backbones: keys, values, saving and loading, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lenvm import LengthBins, LengthValueModel, LenvmConfig, LenvmFormatError
from lenvm.definitions import length_from_logit
from lenvm.format import read_lenvm_config, write_lenvm_config
from lenvm.heads import LengthHead, ValueHead
from tests.core.vision import TOWERS, vision_config

BINS = LengthBins.for_max_length(100)
LENVM = LenvmConfig(gamma=0.98, bins=BINS.centres, base_model="tiny")
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BACKBONES: dict[str, dict[str, Any]] = {
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Llama": {},
    "Mistral": {},
    "Gemma": {"head_dim": 8},
}


def backbone(name: str, directory: Path) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **BACKBONES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_round_trips(name: str, tmp_path: Path) -> None:
    base = backbone(name, tmp_path / "base")
    model = LengthValueModel.from_backbone(tmp_path / "base", LENVM).eval()
    assert isinstance(model, LengthValueModel) and type(model).__name__ == f"{name}ForLengthValue"
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = base.model(ids).last_hidden_state
        out = model(ids)
        # Eq. 7 by hand, on the base's own hidden state: the backbone came over unchanged
        h = model.value_head
        z = torch.nn.functional.silu(hidden @ h.w1.T + h.b1) @ h.w2[0] + h.b2
    assert torch.allclose(out.z, z, atol=1e-5) and out.z.shape == (2, 9)
    assert out.length_logits.shape == (2, 9, len(BINS))

    model.save_pretrained(tmp_path / "lenvm")
    config = json.loads((tmp_path / "lenvm/config.json").read_text())
    assert config["architectures"] == [f"{name}ForLengthValue"]
    assert config["lenvm"]["gamma"] == 0.98 and config["lenvm"]["bins"] == list(BINS.centres)
    again, report = LengthValueModel.from_pretrained(tmp_path / "lenvm", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert {k for k in again.state_dict() if "_head" in k} == {
        f"{head}.{p}" for head in ("value_head", "length_head") for p in ("w1", "b1", "w2", "b2")
    }
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).z, out.z)
        predicted = again.predicted_length(out)
    assert torch.allclose(predicted, BINS.expected(out.length_logits.log_softmax(-1)))


@pytest.mark.parametrize("name", TOWERS)
def test_vision_backbone_round_trips(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = vision_config(name, 64, (60, 61, 62, 63))
    base = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    base.save_pretrained(tmp_path / "base")
    model = LengthValueModel.from_backbone(tmp_path / "base", LENVM).eval()
    assert type(model).__name__ == f"{name}ForLengthValue"
    size = 3 * 2 * TOWERS[name]["patch_size"] ** 2
    ids = torch.tensor([[5, 60, 62, 62, 61, 7, 8]])
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(8, size, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
        "mm_token_type_ids": (ids == 62).int(),
    }
    with torch.no_grad():
        hidden = base.model(**inputs).last_hidden_state
        out = model(**inputs)
        blind = model(input_ids=ids[:, :1])
    assert torch.allclose(out.z, model.value_head(hidden), atol=1e-5) and out.z.shape == (1, 7)
    assert torch.allclose(out.z[:, :1], blind.z, atol=1e-5), "nothing is seen before the image"
    model.save_pretrained(tmp_path / "lenvm")
    again, report = LengthValueModel.from_pretrained(tmp_path / "lenvm", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).z, out.z)
        other = model(**inputs | {"pixel_values": -inputs["pixel_values"]})
    assert not torch.allclose(other.z[0, 3:], out.z[0, 3:], atol=1e-5), "the image is seen"


def test_value_only_checkpoint(tmp_path: Path) -> None:
    backbone("Qwen2", tmp_path)
    model = LengthValueModel.from_backbone(tmp_path, LenvmConfig(gamma=0.9, heads=("value",)))
    out = model(torch.tensor([[3, 4]]))
    assert out.length_logits is None and model.length_head is None
    assert torch.equal(model.predicted_length(out), length_from_logit(out.z, 0.9))
    with pytest.raises(LenvmFormatError, match="value head only"):
        _ = model.bins


def test_value_with_a_cache_equals_value_without(tmp_path: Path) -> None:
    backbone("Llama", tmp_path)
    model = LengthValueModel.from_backbone(tmp_path, LENVM).eval()
    ids = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model(ids).z
        first = model(ids[:, :8], use_cache=True)
        rest = model(ids[:, 8:], past_key_values=first.past_key_values, use_cache=True).z
    assert torch.allclose(torch.cat([first.z, rest], 1), whole, atol=1e-5)


def test_heads_compute_in_float32_and_hide_from_linear_hunters(tmp_path: Path) -> None:
    backbone("Qwen2", tmp_path)
    model = LengthValueModel.from_backbone(tmp_path, LENVM, dtype=torch.bfloat16)
    assert model(torch.tensor([[3, 4]])).z.dtype == torch.float32
    assert not any(isinstance(m, torch.nn.Linear) for m in model.value_head.modules())
    assert not any("Linear" in type(m).__name__ for head in (ValueHead(4), LengthHead(4, 5)) for m in head.modules())
    assert model.get_output_embeddings() is None


def test_loading_what_is_no_length_value_model(tmp_path: Path) -> None:
    backbone("Qwen2", tmp_path)
    with pytest.raises(LenvmFormatError, match="has no `lenvm` block"):
        LengthValueModel.from_pretrained(tmp_path)
    with pytest.raises(LenvmFormatError, match=r"there is no .*config\.json"):
        LengthValueModel.from_pretrained(tmp_path / "nowhere") if (tmp_path / "nowhere").mkdir() is None else None


def test_architecture_that_does_not_fit(tmp_path: Path) -> None:
    backbone("Qwen2", tmp_path / "base")
    LengthValueModel.from_backbone(tmp_path / "base", LENVM).save_pretrained(tmp_path / "lenvm")
    path = tmp_path / "lenvm/config.json"
    config = json.loads(path.read_text())
    config["architectures"] = ["LlamaForLengthValue"]
    path.write_text(json.dumps(config))
    with pytest.raises(
        LenvmFormatError, match=r"names the architecture \['LlamaForLengthValue'\].*Qwen2ForLengthValue"
    ):
        LengthValueModel.from_pretrained(tmp_path / "lenvm")


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"gamma": 1.5}, "gamma.*less than 1"),
        ({"heads": ["value"]}, "gamma"),
        ({"gamma": 0.9, "heads": ["length"], "bins": [1, 2]}, "heads must be"),
        ({"gamma": 0.9}, "bins and the length head go together"),
        ({"gamma": 0.9, "bins": [2, 3]}, "start at 1"),
        ({"gamma": 0.9, "heads": ["value"], "format": 7}, "format 7 is not known"),
        ({"gamma": 0.9, "heads": ["value"], "colour": 1}, "colour"),
        (
            {"gamma": 0.9, "heads": ["value"], "spread": {"log_n_hat": [1], "shift": [0], "sigma": [-1]}},
            "sigma must be positive",
        ),
    ],
)
def test_wrong_blocks(block: dict[str, Any], says: str) -> None:
    with pytest.raises(LenvmFormatError, match=says):
        LenvmConfig.parse(block, "DIR")


def test_config_block_survives_rewriting(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "lenvm": LENVM.to_json()}))
    changed = read_lenvm_config(tmp_path).model_copy(update={"base_model": "other"})
    write_lenvm_config(tmp_path, changed)
    assert read_lenvm_config(tmp_path) == changed
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2"


def test_a_checkpoint_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    """The host library would leave them random."""
    backbone("Qwen2", tmp_path / "base")
    LengthValueModel.from_backbone(tmp_path / "base", LENVM).save_pretrained(tmp_path / "lenvm")
    for folder, lost in (("base", "model.norm.weight"), ("lenvm", "value_head.w1")):
        file = tmp_path / folder / "model.safetensors"
        weights = load_file(file)
        del weights[lost]
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(LenvmFormatError, match=r"model\.norm\.weight"):
        LengthValueModel.from_backbone(tmp_path / "base", LENVM)
    with pytest.raises(LenvmFormatError, match=r"value_head\.w1"):
        LengthValueModel.from_pretrained(tmp_path / "lenvm")
