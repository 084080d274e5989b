"""What people use of LlamaFactory beside the stage, several features in one run: each works as it does for them."""

from __future__ import annotations

import json
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from lenvm import LengthValueModel
from lenvm_lf.packing import PackedCollator, PackedRows, check_packing, pack

STREAM = {"streaming": True, "dataloader_num_workers": 1, "lenvm_gamma": 0.9, "lenvm_max_length": 40}


def metrics(output: Any, key: str) -> Any:
    return json.loads((output / "eval_results.json").read_text())[key]


@pytest.mark.parametrize("seed", range(4))
def test_packs_hold_every_row_once_and_keep_to_their_size(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 200))]
    packs = pack(lengths, 64)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    filled = [sum(lengths[row] for row in rows) for rows in packs]
    assert max(filled) <= 64
    assert len(packs) <= 1.3 * sum(lengths) / 64 + 1, "best fit, longest first, wastes little"


def test_attention_that_would_let_packs_leak_is_refused() -> None:
    from transformers import Qwen2Config

    config = Qwen2Config()
    config._attn_implementation = "flash_attention_2"
    check_packing(config, 1)
    with pytest.raises(ValueError, match=r"under 'flash_attention_2' needs `per_device_train_batch_size: 1`, got 4"):
        check_packing(config, 4)
    config.model_type = "mamba"
    with pytest.raises(ValueError, match=r"tested with gemma, llama, .* only, got 'mamba'"):
        check_packing(config, 1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lenvm_weighting": "trajectory", "lenvm_lambda": 0.9}])
def test_neat_packing_is_unpacked(world: Any, options: dict[str, Any]) -> None:
    """One step over everything: the same loss and gradient, in a few full sequences instead of 48 padded rows."""
    common = {"max_steps": 1, "disable_shuffling": True, **options}
    plain = world.fit(world.root / f"unpacked{len(options)}", per_device_train_batch_size=48, **common)
    packed = world.fit(
        world.root / f"packed{len(options)}", neat_packing=True, per_device_train_batch_size=100, **common
    )
    for key in ("loss", "value_loss", "length_nll", "grad_norm"):
        assert world.steps(packed, key) == pytest.approx(world.steps(plain, key), rel=2e-5), key


def test_packed_rows_do_not_see_each_other(world: Any) -> None:
    """Another first completion changes nothing in the second, and padding is seen by nobody."""
    from lenvm import LenvmConfig

    model = LengthValueModel.from_backbone(world.base, LenvmConfig(gamma=0.9, heads=("value",))).eval()

    def row(ids: list[int]) -> dict[str, Any]:
        return {"input_ids": ids, "prompt_length": 2, "completion_length": len(ids) - 1, "censored": False}

    with torch.no_grad():
        z = []
        for other in ([5, 6, 7], [9, 8, 4]):
            batch = PackedCollator(0, 8)([{"rows": [row(other), row([11, 12, 13, 14])]}, {"rows": [row([3, 4])]}])
            z.append(model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).z)
        alone = model(input_ids=torch.tensor([[11, 12, 13, 14]])).z
    assert torch.equal(z[0][0, 3:7], z[1][0, 3:7])
    assert torch.allclose(z[0][0, 3:7], alone[0], atol=1e-6)
    assert not torch.allclose(z[0][0, :3], z[1][0, :3])
    assert batch["completion"][0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert batch["labels"][0].tolist() == [-100, 2, 1, -100, 3, 2, 1, -100]


@pytest.mark.slow
def test_stream_tokenises_on_the_way(world: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The same first step as without; a bad row is skipped, and reported."""
    common = {"max_steps": 1, "per_device_train_batch_size": 48, "eval_dataset": "held_out", "do_eval": True}
    rest = {key: value for key, value in STREAM.items() if key.startswith("lenvm")}
    plain = world.fit(world.root / "no_stream", **common, **rest)
    world.add("one_bad", [*world.train_rows[:20], {"finish_reason": "abort"}, *world.train_rows[20:]])
    with caplog.at_level(logging.WARNING):
        run = world.fit(world.root / "stream", dataset="one_bad", **common, **STREAM)
    assert world.steps(run) == pytest.approx(world.steps(plain), rel=1e-5), "48 usable rows, in another order"
    assert metrics(run, "eval_mre") == pytest.approx(metrics(plain, "eval_mre"), rel=1e-3)
    assert "row 21 is skipped: `finish_reason` must be `stop` or `length`, got 'abort'" in caplog.text
    world.add("all_bad", [{"finish_reason": "abort"}] * 20)
    with pytest.raises(ValueError, match=r"6 of 6 rows cannot be used .* That is more than 5%"):
        world.fit(world.root / "stream_bad", dataset="all_bad", **common, **STREAM)


@pytest.mark.slow
def test_tokenised_data_best_model_several_sets_bf16_and_checkpointing(world: Any) -> None:
    """`tokenized_path` written and read, `load_best_model_at_end` over several evaluation sets, bf16, recomputation."""
    world.add("other", world.eval_rows[:6])
    common = {
        "tokenized_path": str(world.root / "tokenised"),
        "eval_dataset": "held_out,other",
        "eval_on_each_dataset": True,
        "do_eval": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "max_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_held_out_mre",
        "greater_is_better": False,
        "plot_loss": True,
        "bf16": True,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "disable_gradient_checkpointing": False,
    }
    first = world.fit(world.root / "features", **common)
    assert (world.root / "tokenised" / "dataset_dict.json").is_file()
    again = world.fit(world.root / "features_again", **common)
    assert world.steps(again) == world.steps(first)
    state = json.loads((first / "trainer_state.json").read_text())
    tried = {
        entry["step"]: entry["eval_held_out_mre"] for entry in state["log_history"] if "eval_held_out_mre" in entry
    }
    assert state["best_metric"] == min(tried.values())
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{min(tried, key=tried.__getitem__)}")
    found = json.loads((first / "eval_results.json").read_text())
    assert found["eval_held_out_mre"] == pytest.approx(state["best_metric"], rel=1e-3), "the best model was evaluated"
    assert found["eval_other_targets"] < found["eval_held_out_targets"]
    best = LengthValueModel.from_pretrained(state["best_model_checkpoint"])
    for key, value in LengthValueModel.from_pretrained(first).state_dict().items():
        assert torch.equal(value, best.state_dict()[key]), key
    assert (first / "training_loss.png").is_file()
    DatasetDict({"train": Dataset.from_dict({"input_ids": [[1]]})}).save_to_disk(world.root / "foreign")
    with pytest.raises(ValueError, match="was not tokenised for stage `lenvm`"):
        world.fit(world.root / "foreign_run", tokenized_path=str(world.root / "foreign"), max_steps=1)


@pytest.mark.slow
def test_qlora_leaves_the_heads_whole(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`quantization_bit: 4`: the backbone in 4 bits under LoRA, heads trained in full; the adapter evaluates to the
    same figures on the backbone quantised again."""
    import bitsandbytes as bnb

    from lenvm_lf.trainer import LengthValueTrainer

    kinds: dict[str, set[str]] = {}

    def note(self: Any, *args: Any, model: Any, **kwargs: Any) -> None:
        found = [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
        kinds["4 bit"] = {name.split(".")[-2] for name in found if name.endswith("base_layer")}
        kinds["trained"] = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
        init(self, *args, model=model, **kwargs)

    init = LengthValueTrainer.__init__
    monkeypatch.setattr(LengthValueTrainer, "__init__", note)
    # on CPUs with AVX512-BF16 bitsandbytes packs its weights for a kernel that wants layers of 64 inputs and more
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)
    common = {"finetuning_type": "lora", "quantization_bit": 4, "eval_dataset": "held_out", "do_eval": True}
    run = world.fit(world.root / "qlora", **common, learning_rate=1e-2, max_steps=50, lr_scheduler_type="constant")
    assert kinds["4 bit"] == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in kinds["trained"]} == {
        "value_head",
        "length_head",
    }
    steps = world.steps(run)
    assert sum(steps[-5:]) < 0.9 * sum(steps[:5]), "it learns"
    again = world.fit(
        world.root / "qlora_eval", **common, adapter_name_or_path=str(run), do_train=False, max_steps=None
    )
    for key in ("eval_value_loss", "eval_length_nll", "eval_mre"):
        assert metrics(again, key) == pytest.approx(metrics(run, key), rel=1e-6), key
    with pytest.raises(ValueError, match="`quantization_bit` without `finetuning_type: lora`"):
        world.fit(world.root / "qfull", quantization_bit=4)


@pytest.mark.slow
def test_liger_kernels_train_the_same(world: Any) -> None:
    """Norm, rotary embedding and MLP by Liger's Triton kernels, interpreted on the CPU."""
    common = {"max_steps": 1, "per_device_train_batch_size": 2}
    plain = world.fit(world.root / "no_liger", **common)
    settings = world.settings(world.root / "liger", enable_liger_kernel=True, **common)
    done = world.run(settings, route="interpreted", env={"TRITON_INTERPRET": "1", "LLAMAFACTORY_VERBOSITY": "INFO"})
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Liger kernel has been applied to the model" in done.stdout + done.stderr
    for key in ("loss", "value_loss", "length_nll", "grad_norm"):
        assert world.steps(world.root / "liger", key) == pytest.approx(world.steps(plain, key), rel=1e-4), key
    with pytest.raises(ValueError, match=r"`use_liger_kernel`.*`enable_liger_kernel: true`"):
        world.fit(world.root / "other_liger", use_liger_kernel=True)


def test_packed_rows_are_the_rows(world: Any) -> None:
    rows = Dataset.from_dict({"length": [5, 3, 9], "row": [1, 2, 3]})
    packed = PackedRows(rows, 9)
    assert sorted(row["row"] for i in range(len(packed)) for row in packed[i]["rows"]) == [1, 2, 3]
    assert len(packed) == 2
    assert np.concatenate(packed.packs).size == 3
