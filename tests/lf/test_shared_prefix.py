"""Shared-prefix packing equals one row a completion: values, gradients, whole runs; and nothing leaks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lenvm import LengthBins, LengthValueModel, LenvmConfig
from lenvm.objective import Objective
from lenvm_lf.collator import IGNORE, DenseReturnCollator
from lenvm_lf.shared_prefix import SharedPrefixCollator, check_backbone
from tests.core.test_modeling import BACKBONES, SMALL

LENVM = LenvmConfig(gamma=0.9, bins=LengthBins.for_max_length(30).centres)
PROMPTS = ([5, 6, 7, 8, 9], [5, 6, 7, 8, 10], [11])  # two that differ in the last token only, and one of one token


def rows(seed: int = 0) -> list[dict[str, Any]]:
    """Samples of three prompts, mixed; one censored, one cut at the cutoff."""
    rng = np.random.default_rng(seed)
    out = []
    for i, (prompt, length) in enumerate([(0, 4), (1, 6), (0, 1), (2, 5), (1, 3), (0, 9), (2, 2)]):
        ids = np.concatenate([PROMPTS[prompt], rng.integers(12, 60, length)])[:-1]
        out.append(
            {
                "input_ids": ids[:11],
                "prompt_length": len(PROMPTS[prompt]),
                "completion_length": length,
                "censored": i == 1,
                "prompt_hash": prompt,
            }
        )
    return out


def model(name: str) -> Any:
    torch.manual_seed(0)
    return LengthValueModel.from_backbone(getattr(transformers, f"{name}Config")(**options(name)), LENVM).eval()


def options(name: str) -> dict[str, Any]:
    return {**SMALL, **BACKBONES[name]} | ({"sliding_window": None} if name == "Mistral" else {})


def forward(lenvm: Any, batch: dict[str, torch.Tensor]) -> Any:
    return lenvm(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "position_ids")})


def by_row(batch: dict[str, torch.Tensor], z: torch.Tensor, raw: list[dict[str, Any]]) -> list[torch.Tensor]:
    """z of each completion's states, in the order of the raw rows; plain and packed batches alike."""
    if "completion" not in batch:
        return [z[i][batch["labels"][i] != IGNORE] for i in range(len(raw))]
    order: dict[bytes, list[int]] = {}
    for i, row in enumerate(raw):
        order.setdefault(row["input_ids"][: row["prompt_length"]].tobytes(), []).append(i)
    found = {}
    for b, members in enumerate(order.values()):
        for number, i in enumerate(members, start=1):
            found[i] = z[b][(batch["completion"][b] == number) & (batch["labels"][b] != IGNORE)]
    return [found[i] for i in range(len(raw))]


@pytest.mark.parametrize("name", BACKBONES)
def test_packed_is_unpacked(name: str) -> None:
    """Values to 1e-6 and gradients of the loss, in float32, every option that looks along a completion switched on."""
    lenvm, raw = model(name), rows()
    check_backbone(lenvm.config)
    plain, packed = DenseReturnCollator(0)(raw), SharedPrefixCollator(0, multiple_of=4)(raw)
    assert packed["input_ids"].shape[0] == 3 and packed["input_ids"].shape[1] % 4 == 0
    assert int((packed["labels"] != IGNORE).sum()) == int((plain["labels"] != IGNORE).sum())
    objective = Objective(LENVM.value_space, LENVM.length_bins, lam=0.7, bootstrap=True, weighting="trajectory")
    results = []
    for batch in (plain, packed):
        lenvm.zero_grad()
        out = forward(lenvm, batch)
        mask, completion = batch["labels"] != IGNORE, batch.get("completion")
        value, length = objective.sums(out.z, out.length_logits, batch["labels"], mask, batch["censored"], completion)
        (value + length).backward()
        gradient = torch.cat([p.grad.flatten() for p in lenvm.parameters() if p.grad is not None])
        count = int(objective.counted(mask, completion).sum())
        results.append((by_row(batch, out.z.detach(), raw), value.item(), length.item(), gradient, count))
    a, b = results
    assert all(torch.allclose(x, y, atol=1e-6, rtol=0) for x, y in zip(a[0], b[0], strict=True))
    assert a[1:3] == pytest.approx(b[1:3], rel=1e-5)
    assert torch.allclose(a[3], b[3], atol=1e-5, rtol=1e-4)
    assert a[4] == b[4] == len(raw)


def test_nothing_leaks() -> None:
    """Other tokens in one completion, in another prompt or in the padding move nothing else."""
    lenvm, raw = model("Llama"), rows()
    collate = SharedPrefixCollator(0, multiple_of=16)

    def values(changed: list[dict[str, Any]], pad: int = 0) -> list[torch.Tensor]:
        batch = collate(changed)
        batch["input_ids"][(batch["labels"] == IGNORE) & (batch["position_ids"] == 0) & (batch["input_ids"] == 0)] = pad
        with torch.no_grad():
            return by_row(batch, forward(lenvm, batch).z, changed)

    before = values(raw)
    other = [dict(row) for row in raw]
    other[5]["input_ids"] = np.concatenate([raw[5]["input_ids"][:6], [60] * 5])
    after = values(other, pad=63)
    for i, (x, y) in enumerate(zip(before, after, strict=True)):
        if i == 5:
            assert torch.allclose(x[:2], y[:2], atol=1e-7) and (x[2:] - y[2:]).abs().min() > 1e-5
        else:
            assert torch.allclose(x, y, atol=1e-7)


def test_backbones_that_a_mask_does_not_decide() -> None:
    config = transformers.MistralConfig(**SMALL, sliding_window=8)
    with pytest.raises(ValueError, match="needs full attention, got a sliding window of 8"):
        check_backbone(config)
    config = transformers.LlamaConfig(**SMALL, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"needs the attention `sdpa`, .* got 'eager'"):
        check_backbone(config)
    with pytest.raises(ValueError, match=r"is tested with gemma, .* got 'gpt2'"):
        check_backbone(transformers.GPT2Config())


@pytest.mark.slow
def test_a_packed_run_is_the_unpacked_run(world: Any) -> None:
    """Losses and gradient norms at every step, accumulation included, with gradient checkpointing; evaluation too."""
    common = {
        "disable_shuffling": True,
        "max_steps": 3,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "lenvm_weighting": "trajectory",
        "lenvm_lambda": 0.9,
        "eval_dataset": "held_out",
        "do_eval": True,
    }
    plain = world.fit(world.root / "unpacked", **common)
    packed = world.fit(
        world.root / "packed",
        lenvm_shared_prefix=True,
        disable_gradient_checkpointing=False,
        flash_attn="sdpa",
        **common,
    )
    for key in ("loss", "value_loss", "length_nll", "grad_norm"):
        assert world.steps(packed, key) == pytest.approx(world.steps(plain, key), rel=2e-5), key
    found, wanted = (json.loads((run / "eval_results.json").read_text()) for run in (packed, plain))
    timed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert found.keys() == wanted.keys()
    for key in found.keys() - set(timed):
        assert found[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-6), key
