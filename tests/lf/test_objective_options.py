"""The options of the objective in real runs; their mathematics is tested against loops in tests/core."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lenvm import LengthValueModel, LenvmFormatError
from lenvm_lf.samplers import PromptSampler

OPTIONS = {"lenvm_weighting": "trajectory", "lenvm_huber": 0.05, "lenvm_lambda": 0.9, "lenvm_censored": "bootstrap"}


@pytest.mark.slow
def test_options_hold_over_the_whole_step(world: Any) -> None:
    """The denominator of trajectory means counts completions over all accumulation steps."""
    common = {"disable_shuffling": True, "max_steps": 2, **OPTIONS}
    whole = world.fit(world.root / "options_whole", per_device_train_batch_size=24, **common)
    split = world.fit(
        world.root / "options_split", per_device_train_batch_size=6, gradient_accumulation_steps=4, **common
    )
    plain = world.fit(world.root / "options_plain", per_device_train_batch_size=24, disable_shuffling=True, max_steps=1)
    for key in ("loss", "value_loss", "length_nll", "grad_norm"):
        assert world.steps(split, key) == pytest.approx(world.steps(whole, key), rel=2e-5), key
        assert world.steps(plain, key)[0] != pytest.approx(world.steps(whole, key)[0], rel=1e-3), key


@pytest.mark.slow
def test_representation_stays_with_the_checkpoint(world: Any) -> None:
    run = world.fit(
        world.root / "log_length",
        lenvm_target="log_length",
        lenvm_batches="by_prompt",
        eval_dataset="held_out",
        do_eval=True,
        max_steps=3,
    )
    block = json.loads((run / "config.json").read_text())["lenvm"]
    assert block["target"] == {"representation": "log_length"}
    assert json.loads((run / "eval_results.json").read_text())["eval_length_mae"] < 100
    again = world.fit(
        world.root / "log_length_eval",
        model_name_or_path=str(run),
        do_train=False,
        do_eval=True,
        dataset=None,
        eval_dataset="held_out",
        max_steps=None,
    )
    for name in ("eval_length_mae", "eval_value_loss", "eval_mre"):
        found, wanted = (json.loads((place / "eval_results.json").read_text())[name] for place in (again, run))
        assert found == pytest.approx(wanted, rel=1e-5), name
    with pytest.raises(LenvmFormatError, match="was trained with `lenvm_target: log_length`"):
        LengthValueModel.from_pretrained(run)
    for wrong, message in (
        ({"lenvm_target": "length"}, "`lenvm_target` is 'length', but .* was trained with 'log_length'"),
        ({"lenvm_lambda": 0.5}, "need the discounted return, but .* was trained with 'log_length'"),
    ):
        with pytest.raises(ValueError, match=message):
            world.fit(world.root / "refused", model_name_or_path=str(run), **wrong)


def test_prompt_sampler_keeps_prompts_together() -> None:
    prompts = [7, -3, 7, 5, -3, 7, 5, 5, -3]
    sampler = PromptSampler(prompts, seed=4)
    orders = []
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(len(sampler))) == list(range(9))
        groups = [{prompts[i] for i in order[k : k + 3]} for k in (0, 3, 6)]
        assert all(len(group) == 1 for group in groups)
        orders.append(tuple(order))
    assert len(set(orders)) == 3, "another order each epoch"
    assert tuple(PromptSampler(prompts, seed=4)) == orders[0]
    assert tuple(PromptSampler(prompts, seed=5)) != orders[0]
