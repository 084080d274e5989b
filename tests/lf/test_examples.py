"""The YAML files of examples/train name only settings that exist, and the page names every setting of the stage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from transformers import AutoTokenizer

from lenvm import LengthValueModel
from tests.core.test_modeling import BACKBONES, SMALL
from tests.lf.test_images import make_vision_base, mixed_rows

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples" / "train").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_names_only_known_settings(world: Any, path: Path) -> None:
    from llamafactory.hparams import parser

    from lenvm_lf.arguments import check_supported

    settings = yaml.safe_load(path.read_text())
    known = {field.name for group in parser._TRAIN_ARGS for field in dataclasses.fields(group)}
    assert set(settings) <= known
    assert settings["stage"] == "lenvm"
    if "deepspeed" in settings:
        assert json.loads((ROOT / settings["deepspeed"]).read_text())["zero_optimization"]["stage"] == 3
    # what needs a GPU is left out here, everything else must be accepted
    small = {k: v for k, v in settings.items() if k not in ("deepspeed", "bf16")} | {"use_cpu": True}
    model_args, data_args, training_args, finetuning_args, _ = parser._parse_train_args(small)
    check_supported(model_args, data_args, training_args, finetuning_args)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_tiny_twin_of_an_example_runs(world: Any, path: Path) -> None:
    """One step with everything the file says, except where its model, data and GPUs are."""
    settings = yaml.safe_load(path.read_text())
    name = settings["model_name_or_path"]
    kind = "Qwen2_5_VL" if "VL" in name else "Qwen3" if "Qwen3" in name else "Qwen2"
    base = world.base if kind == "Qwen2" else world.root / f"twin_{kind}"
    dataset = "train"
    if kind == "Qwen2_5_VL":
        make_vision_base(world, kind, base)
        dataset = "twin_images"
        world.add(dataset, mixed_rows(AutoTokenizer.from_pretrained(base), world.data, 4, seed=3))
    elif kind == "Qwen3":
        changes = {"vocab_size": len(world.tokenizer), "eos_token_id": 2}
        config = transformers.Qwen3Config(**{**SMALL, **BACKBONES["Qwen3"], **changes})
        torch.manual_seed(0)
        transformers.Qwen3ForCausalLM(config).save_pretrained(base)
        world.tokenizer.save_pretrained(base)
    elsewhere = {
        "model_name_or_path": str(base),
        "dataset_dir": str(world.data),
        "dataset": dataset,
        "deepspeed": None,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "preprocessing_num_workers": 1,
        "max_steps": 1,
        "val_size": 0.2,
    }
    run = world.fit(
        world.root / f"twin_{path.stem}",
        **{**settings, **elsewhere, "output_dir": str(world.root / f"twin_{path.stem}")},
    )
    assert json.loads((run / "eval_results.json").read_text())["eval_targets"] > 0
    if settings["finetuning_type"] == "full":
        assert type(LengthValueModel.from_pretrained(run)).__name__ == f"{kind}ForLengthValue"


def test_page_names_every_setting_of_the_stage() -> None:
    from lenvm_lf.arguments import LENVM_DEFAULTS

    page = (ROOT / "docs" / "training.md").read_text()
    assert all(f"`{name}`" in page for name in LENVM_DEFAULTS)


def test_page_names_every_metric() -> None:
    import numpy as np

    from lenvm import LengthBins, LenvmConfig
    from lenvm_lf.metrics import POSITIONS, LengthMetrics

    metrics = LengthMetrics(LenvmConfig(gamma=0.9, bins=LengthBins.for_max_length(8).centres), 0.1)
    tokens = np.array([[[2.0, 0.1, 2.0], [1.0, 0.2, 1.0]]], np.float32)
    rows = np.array([[0, 0.1, 0.2, 1, 2, 3]] * 2, np.float32)
    metrics.update(np.repeat(tokens, 2, axis=0), rows, np.array([-5, -5]))
    assert {"mre", "expected_mre", "coverage_p10", "value_calibration_error"} <= set(metrics.result())
    page = (ROOT / "docs" / "training.md").read_text()
    for name in metrics.result():
        stem = name
        for position in POSITIONS:
            stem = stem.removesuffix(f"_{position}")
        assert f"`{stem}" in page, name
    assert LengthMetrics(metrics.lenvm, 0.1).result() == {"targets": 0, "censored_targets": 0}
