"""`training.json`: what a real run writes about itself, and that it holds no secret."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from lenvm.evaluation.runs.record import TrainingRecord
from lenvm_lf.record import settings_of


@pytest.mark.slow
def test_a_run_says_what_it_was_given(world: Any, trained: Path) -> None:
    record = TrainingRecord.read(trained)
    assert record.settings["learning_rate"] == 1e-3
    assert record.settings["lenvm_target"] == "return" and record.settings["lenvm_gamma"] == "auto"
    assert record.settings["model_name_or_path"] == str(world.base)
    assert "weight_decay" not in record.settings, "a default of the host"
    assert record.train is not None
    assert record.train.prompts == len({row["prompt_id"] for row in world.train_rows})
    assert record.train.completions == len(world.train_rows)
    assert record.train.tokens == sum(len(row["completion_token_ids"]) for row in world.train_rows)
    metrics = json.loads((trained / "eval_results.json").read_text())
    assert record.evaluation["eval"].tokens == metrics["eval_targets"]
    with safe_open(trained / "model.safetensors", "pt") as weights:
        shapes = [weights.get_slice(key).get_shape() for key in weights.keys()]  # noqa: SIM118
    count = 0
    for shape in shapes:
        size = 1
        for n in shape:
            size *= n
        count += size
    assert record.parameters == record.trainable == count


@dataclass
class Arguments:
    learning_rate: float = 1e-3
    hf_hub_token: str | None = None
    swanlab_api_key: str | None = None
    targets: list[str] = field(default_factory=lambda: ["all"])
    lenvm_lambda: float = 1.0
    device: Any = None


def test_secrets_defaults_and_objects_are_left_out() -> None:
    assert settings_of(Arguments()) == {"lenvm_lambda": 1.0}
    given = Arguments(0.1, "hidden", "hidden", ["a"], 0.5, device=object())
    assert settings_of(given) == {"learning_rate": 0.1, "targets": ["a"], "lenvm_lambda": 0.5}
