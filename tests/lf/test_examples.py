"""The YAML files of examples/train name only settings that exist, and the page names every setting of the stage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

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
