"""Target representations: predicted lengths invert targets, what is no representation is refused, nor is it served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lenvm import LengthValueModel, LenvmConfig, LenvmFormatError
from lenvm.format import AblationTarget, read_lenvm_config
from lenvm.targets import REPRESENTATIONS, ValueSpace


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_predicted_length_inverts_the_target(representation: str) -> None:
    """At the z whose error is zero, the predicted length is the target's: found by bisection."""
    longest = 80 if representation == "normalized_length" else None
    space = ValueSpace(0.97, representation, longest)  # type: ignore[arg-type]
    for n in (1, 3, 40, 79):
        low, high = torch.tensor(-50.0, dtype=torch.float64), torch.tensor(90.0, dtype=torch.float64)
        for _ in range(100):
            middle = (low + high) / 2
            too_short = space.shortfall(middle, torch.tensor(n)) > 0
            low, high = (middle, high) if too_short else (low, middle)
        assert space.length(low).item() == pytest.approx(n, rel=1e-6)


def test_wrong_spaces() -> None:
    with pytest.raises(ValueError, match="must be one of return, length, normalized_length, log_length, got 'tokens'"):
        ValueSpace(0.9, "tokens")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`normalized_length` needs the length that counts as 1"):
        ValueSpace(0.9, "normalized_length")
    with pytest.raises(ValueError, match="no other representation takes one, got 8 with 'return'"):
        ValueSpace(0.9, longest=8)


def test_a_block_of_an_ablation_is_not_served(tmp_path: Path) -> None:
    plain = LenvmConfig(gamma=0.9, heads=("value",))
    assert "target" not in plain.to_json(), "checkpoints of the default are as they were"
    lenvm = plain.model_copy(update={"target": AblationTarget(representation="log_length")})
    assert LenvmConfig.parse(lenvm.to_json(), "DIR").value_space.representation == "log_length"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "lenvm": lenvm.to_json()}))
    for read in (read_lenvm_config, LengthValueModel.from_pretrained):
        with pytest.raises(LenvmFormatError, match="was trained with `lenvm_target: log_length`, a comparison"):
            read(tmp_path)
    with pytest.raises(LenvmFormatError, match="target is left out where it is the discounted return"):
        LenvmConfig.parse(plain.to_json() | {"target": {"representation": "return"}}, "DIR")
