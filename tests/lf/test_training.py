"""Training runs of the stage on a tiny model, against brute force."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

from lenvm import LengthValueModel, LenvmConfig
from lenvm.format import read_lenvm_config
from lenvm_lf.checkpoint import adapter_block

STREAM = {"streaming": True, "dataloader_num_workers": 1, "lenvm_gamma": 0.9, "lenvm_max_length": 40}
EVERYTHING = {"per_device_train_batch_size": 48, "max_steps": 1, "disable_shuffling": True}


def states(model: Any, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Every state of a completion, each from a forward pass of its own, heads in float64."""
    out = []
    prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
    for t in range(len(completion)):
        with torch.no_grad():
            h = model.model(torch.tensor([prompt + completion[:t]])).last_hidden_state[0, -1].double()

            def head(part: Any, h: torch.Tensor = h) -> torch.Tensor:
                inner = torch.nn.functional.silu(part.w1.double() @ h + part.b1.double())
                return part.w2.double() @ inner + part.b2.double()

            z = float(head(model.value_head)[0])
            q = torch.softmax(head(model.length_head), -1)
        out.append({"n": len(completion) - t, "z": z, "q": q, "cut": row["finish_reason"] == "length"})
    return out


def brute_force(directory: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Both losses and the evaluation metrics, written down from their definitions."""
    model = LengthValueModel.from_pretrained(directory).eval()
    gamma, centres = model.lenvm.gamma, np.array(model.lenvm.bins, dtype=np.float64)
    longest = int(centres[-1])
    dec = np.zeros((len(centres), longest + 1))
    for n in range(1, longest + 1):  # two-hot weight of n on its neighbouring centres, then normalised per bin
        k = int(np.searchsorted(centres, n))
        if centres[k] == n:
            dec[k, n] = 1.0
        else:
            dec[k, n] = (n - centres[k - 1]) / (centres[k] - centres[k - 1])
            dec[k - 1, n] = 1.0 - dec[k, n]
    two_hot = dec.copy()
    dec /= dec.sum(1, keepdims=True)
    values, nlls, firsts, errors, maes, means, pairs, prompts = [], [], [], [], [], [], [], {}
    by_position: dict[int, list[float]] = {0: [], 25: [], 50: [], 75: []}
    for row in rows:
        sequence = states(model, row)
        for t, s in enumerate(sequence):
            u = 1.0 / (1.0 + math.exp(-s["z"]))
            error = -u + (1.0 - gamma ** s["n"])
            n_hat = math.log1p(math.exp(s["z"])) / -math.log(gamma)
            pmf = s["q"].numpy() @ dec
            if s["cut"]:
                values.append(max(error, 0.0) ** 2)
                nlls.append(-math.log(pmf[s["n"] :].sum()))
                continue
            values.append(error**2)
            n = min(s["n"], longest)
            nlls.append(-float((two_hot[:, n] * np.log(s["q"].numpy())).sum()))
            errors.append(error)
            mean = float(pmf @ np.arange(longest + 1))
            maes.append(abs(n_hat - s["n"]))
            means.append(abs(mean - s["n"]))
            pairs.append((n_hat, mean, s["n"]))
            for position, found in by_position.items():
                if t == len(sequence) * position // 100:
                    found.append(abs(n_hat - s["n"]))
            if t == 0:
                cdf = pmf.cumsum()
                firsts.append((s["n"], mean, *(int((cdf < p - 1e-6).sum()) for p in (0.1, 0.5, 0.9))))
                prompts.setdefault(row["prompt_id"], []).append((s["n"], n_hat, mean))
    total = sum(f[0] for f in firsts)
    return {
        "value_loss": np.mean(values),
        "length_nll": np.mean(nlls),
        "value_mse": np.mean(np.square(errors)),
        "value_mae": np.mean(np.abs(errors)),
        "length_mae": np.mean(maes),
        "expected_length_mae": np.mean(means),
        "expected_length_bias": sum(f[1] - f[0] for f in firsts) / total,
        "coverage_p10": np.mean([f[0] <= f[2] for f in firsts]),
        "coverage_p50": np.mean([f[0] <= f[3] for f in firsts]),
        "coverage_p90": np.mean([f[0] <= f[4] for f in firsts]),
        **boundary(prompts, [row["prompt_id"] for row in rows if row["finish_reason"] == "length"], gamma),
        "value_calibration_error": calibration_error([(p[0], p[2]) for p in pairs]),
        "expected_calibration_error": calibration_error([(p[1], p[2]) for p in pairs]),
        "targets": len(values),
        "censored_targets": len(values) - len(errors),
        **{f"length_mae_{p}": np.mean(found) for p, found in by_position.items()},
    }


def boundary(prompts: dict[str, list[Any]], cut: list[str], gamma: float) -> dict[str, float]:
    """Eq. 13-15 over the prompts with at least two samples and none of them cut."""
    groups = [g for p, g in prompts.items() if p not in cut and len(g) >= 2]
    errors, means = [], []
    for g in groups:
        mu = sum(1 - gamma**n for n, _, _ in g) / len(g)
        truth = math.log(1 - mu) / math.log(gamma)
        errors.append(abs(g[0][1] - truth) / truth)
        mean = sum(n for n, _, _ in g) / len(g)
        means.append(abs(g[0][2] - mean) / mean)
    return {"mre": np.mean(errors), "expected_mre": np.mean(means), "mre_prompts": len(groups)}


def calibration_error(pairs: list[tuple[float, float]]) -> float:
    """|mean predicted - mean true| / mean true over tenths of the states by prediction, weighted by states."""
    pairs = sorted(pairs, key=lambda p: p[0])
    size, rest = divmod(len(pairs), 10)
    total, at = 0.0, 0
    for k in range(10):
        part = pairs[at : at + size + (k < rest)]
        at += len(part)
        predicted, true = (sum(p[i] for p in part) / len(part) for i in (0, 1))
        total += len(part) * abs(predicted - true) / true
    return total / len(pairs)


@pytest.mark.slow
def test_loss_is_the_brute_force_loss(world: Any, trained: Path) -> None:
    """Eq. 9 over all target tokens, value and length, censored rows included; first step from a given checkpoint."""
    wanted = brute_force(trained, world.train_rows)
    assert wanted["censored_targets"] > 0
    run = world.fit(world.root / "one_step", model_name_or_path=str(trained), **EVERYTHING)
    assert world.steps(run, "value_loss") == pytest.approx([wanted["value_loss"]], rel=1e-5)
    assert world.steps(run, "length_nll") == pytest.approx([wanted["length_nll"]], rel=1e-5)
    assert world.steps(run) == pytest.approx([wanted["value_loss"] + 0.1 * wanted["length_nll"]], rel=1e-5)


@pytest.mark.slow
def test_metrics_are_the_brute_force_metrics(world: Any, trained: Path) -> None:
    """Streamed in batches of 8 during the real run, against one state at a time."""
    wanted = brute_force(trained, world.eval_rows)
    found = json.loads((trained / "eval_results.json").read_text())
    assert wanted["censored_targets"] > 0
    for key, value in wanted.items():
        assert found[f"eval_{key}"] == pytest.approx(value, rel=2e-4, abs=1e-6), key
    assert found["eval_loss"] == pytest.approx(wanted["value_loss"] + 0.1 * wanted["length_nll"], rel=2e-4)


@pytest.mark.slow
def test_checkpoint_is_the_documented_format(world: Any, trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForLengthValue"]
    assert config["model_type"] == "qwen2"
    block = read_lenvm_config(trained)
    lengths = [len(r["completion_token_ids"]) for r in world.train_rows]
    assert block.gamma == pytest.approx(0.01 ** (1 / np.quantile(lengths, 0.99)), abs=1e-9)
    assert block.bins[-1] == max(lengths)
    assert block.base_model == str(world.base)
    assert block.spread is not None, "there was an evaluation set"
    from safetensors import safe_open

    with safe_open(trained / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    heads = {f"{head}.{name}" for head in ("value_head", "length_head") for name in ("w1", "b1", "w2", "b2")}
    assert heads <= keys
    assert not any(key.startswith("lm_head") for key in keys)
    assert (trained / "tokenizer.json").is_file()
    assert len(world.steps(trained)) == 6
    assert all((trained / f"training_{name}.png").is_file() for name in ("loss", "value_loss", "length_nll"))
    lines = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    assert pyarrow.parquet.read_table(trained / "predictions.parquet").to_pylist() == lines
    deciles = json.loads((trained / "calibration.json").read_text())["eval"]
    assert {len(deciles[name]) for name in ("value", "expected")} == {10}
    assert sorted(line["row"] for line in lines) == list(range(1, 16))
    for line in lines:
        source = world.eval_rows[line["row"] - 1]
        assert line["completion_length"] == len(source["completion_token_ids"])
        assert line["censored"] == (source["finish_reason"] == "length")


@pytest.mark.slow
@pytest.mark.parametrize("batch", [6, 12, 24])
def test_accumulation_does_not_change_the_step(world: Any, batch: int) -> None:
    """Micro-batches hold unequal numbers of target tokens; a mean of means would show. Nor does checkpointing."""
    common = {"disable_shuffling": True, "max_steps": 3}
    whole = world.root / "acc_whole"
    if not whole.exists():
        world.fit(whole, per_device_train_batch_size=24, **common)
    split = world.fit(
        world.root / f"acc_{batch}",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=24 // batch,
        disable_gradient_checkpointing=batch != 24,
        **common,
    )
    for key in ("loss", "value_loss", "length_nll", "grad_norm"):
        assert world.steps(split, key) == pytest.approx(world.steps(whole, key), rel=2e-5), key


def test_grouped_batches_come_in_random_order() -> None:
    """Each batch is of similar lengths, but nothing leads from long to short: the length is what is learned."""
    from lenvm_lf.samplers import ShuffledLengthGroups

    torch.manual_seed(0)
    lengths = torch.randint(1, 400, (1605,)).tolist()
    order = list(ShuffledLengthGroups(16, lengths=lengths))
    assert sorted(order) == list(range(1605))
    batches = [[lengths[i] for i in order[k : k + 16]] for k in range(0, 1605, 16)]
    means = np.array([np.mean(batch) for batch in batches])
    assert np.mean([np.ptp(batch) for batch in batches[:-1]]) < 40, "little padding"
    drift = np.corrcoef(means, np.arange(len(means)))[0, 1]
    assert abs(drift) < 0.3, drift
    assert abs(means[-25:].mean() - means.mean()) < 60


@pytest.mark.slow
def test_resume_goes_on_digit_for_digit(world: Any) -> None:
    through = world.fit(world.root / "through", save_steps=3, max_steps=6, train_sampling_strategy="group_by_length")
    parted = world.root / "parted"
    shutil.copytree(through / "checkpoint-3", parted / "checkpoint-3")
    world.fit(parted, save_steps=3, max_steps=6, train_sampling_strategy="group_by_length")
    assert world.steps(parted) == world.steps(through)
    assert world.steps(parted, "value_loss") == world.steps(through, "value_loss")
    assert (parted / "model.safetensors").read_bytes() == (through / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_lora_export_gives_the_same_values(world: Any) -> None:
    adapter = world.fit(
        world.root / "lora",
        finetuning_type="lora",
        lora_rank=4,
        eval_dataset="held_out",
        do_eval=True,
        learning_rate=5e-3,
    )
    block = adapter_block(adapter)
    assert block is not None
    assert block.spread is not None
    exported = world.root / "exported"
    settings = {
        "model_name_or_path": str(world.base),
        "adapter_name_or_path": str(adapter),
        "finetuning_type": "lora",
        "stage": "lenvm",
        "template": "qwen",
        "export_dir": str(exported),
        "infer_dtype": "float32",
    }
    done = world.run(settings, command="export")
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_lenvm_config(exported) == block
    from peft import PeftModel

    inputs = torch.tensor([world.train_rows[0]["prompt_token_ids"] + world.train_rows[0]["completion_token_ids"]])
    merged = LengthValueModel.from_pretrained(exported).eval()
    fresh = LengthValueModel.from_backbone(world.base, block)
    together = PeftModel.from_pretrained(fresh, adapter).eval()
    with torch.no_grad():
        a, b = merged(inputs), together(inputs)
        plain = LengthValueModel.from_backbone(world.base, block).eval()(inputs)
    assert torch.allclose(a.z, b.z, atol=1e-5)
    assert torch.allclose(a.length_logits, b.length_logits, atol=1e-5)
    assert (a.z - plain.z).abs().max() > 1e-2, "heads and adapter were trained"
    # the metrics of the adapter and of the exported model agree too
    found = json.loads((adapter / "eval_results.json").read_text())
    again = world.fit(
        world.root / "lora_eval",
        model_name_or_path=str(exported),
        do_train=False,
        do_eval=True,
        dataset=None,
        eval_dataset="held_out",
        max_steps=None,
    )
    exported_metrics = json.loads((again / "eval_results.json").read_text())
    for key in ("eval_loss", "eval_length_mae", "eval_length_nll", "eval_coverage_p90"):
        assert exported_metrics[key] == pytest.approx(found[key], rel=1e-4), key


@pytest.mark.slow
def test_continues_from_a_checkpoint_and_refuses_another_gamma(world: Any, trained: Path) -> None:
    block = read_lenvm_config(trained)
    run = world.fit(world.root / "more", model_name_or_path=str(trained), lenvm_gamma=block.gamma, max_steps=2)
    found = read_lenvm_config(run)
    assert found == block.model_copy(update={"spread": None}), "the old spread speaks of other weights"
    for key, value, message in (
        ("lenvm_gamma", 0.99, r"`lenvm_gamma` is 0\.99, but .* was trained with"),
        ("lenvm_heads", "value", r"`lenvm_heads` is 'value', but .* has 'value,length'"),
        ("lenvm_max_length", 5, r"`lenvm_max_length` is 5, but the bins of .* reach"),
    ):
        with pytest.raises(ValueError, match=message):
            world.fit(world.root / "refused", model_name_or_path=str(trained), **{key: value})


@pytest.mark.slow
def test_value_head_only(world: Any) -> None:
    run = world.fit(
        world.root / "value_only",
        lenvm_heads="value",
        lenvm_gamma=0.9,
        eval_dataset="held_out",
        do_eval=True,
        max_steps=2,
    )
    assert read_lenvm_config(run).model_copy(update={"spread": None}) == LenvmConfig(
        heads=("value",), gamma=0.9, base_model=str(world.base)
    )
    assert LengthValueModel.from_pretrained(run).length_head is None
    metrics = json.loads((run / "eval_results.json").read_text())
    assert metrics["eval_loss"] == metrics["eval_value_loss"]
    assert "eval_length_nll" not in metrics
    assert not world.steps(run, "length_nll")


@pytest.mark.slow
def test_censored_rows_can_be_dropped(world: Any) -> None:
    finished = [r for r in world.train_rows if r["finish_reason"] == "stop"]
    world.add("finished", finished)
    common = {"disable_shuffling": True, "max_steps": 2, "lenvm_max_length": 40, "lenvm_gamma": 0.9}
    dropped = world.fit(world.root / "dropped", lenvm_censored="drop", **common)
    without = world.fit(world.root / "without", dataset="finished", **common)
    kept = world.fit(world.root / "kept", **common)
    assert world.steps(dropped) == world.steps(without)
    assert world.steps(dropped) != world.steps(kept)
    assert read_lenvm_config(dropped).bins[-1] == 40


@pytest.mark.slow
def test_validation_split_by_prompt_and_text_data(world: Any) -> None:
    """Ordinary chat data with `val_size`, freeze tuning."""
    run = world.fit(
        world.root / "split",
        dataset="chat",
        val_size=0.25,
        preprocessing_num_workers=2,
        do_eval=True,
        max_steps=2,
        finetuning_type="freeze",
        freeze_trainable_layers=1,
    )
    metrics = json.loads((run / "eval_results.json").read_text())
    assert metrics["eval_censored_targets"] == 0
    assert read_lenvm_config(run).spread is not None
    trained_heads = LengthValueModel.from_pretrained(run)
    base = LengthValueModel.from_backbone(world.base, read_lenvm_config(run))
    moved = {
        n
        for (n, a), b in zip(trained_heads.named_parameters(), base.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert {"value_head.w1", "length_head.w2"} <= moved
    assert any(".layers.1." in name for name in moved)
    assert not any(".layers.0." in name or "embed" in name for name in moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lenvm_gamma": 1.5}, "`lenvm_gamma` must be `auto` or a number strictly between 0 and 1, got 1.5"),
        ({"lenvm_gamma": "fast"}, "got 'fast'"),
        ({"lenvm_heads": "length"}, "`lenvm_heads` must be `value` or `value,length`, got 'length'"),
        ({"lenvm_length_weight": -1}, "`lenvm_length_weight` must be a finite number, 0 or more, got -1"),
        ({"lenvm_censored": "guess"}, "`lenvm_censored` must be one of one_sided, bootstrap, drop, got 'guess'"),
        (
            {"lenvm_target": "tokens"},
            "`lenvm_target` must be one of return, length, normalized_length, log_length, got",
        ),
        ({"lenvm_lambda": 2}, "`lenvm_lambda` must be a number from 0 to 1, got 2"),
        ({"lenvm_huber": 0}, "`lenvm_huber` must be a finite number above 0, got 0"),
        ({"lenvm_weighting": "row"}, "`lenvm_weighting` must be one of token, trajectory, got 'row'"),
        ({"lenvm_batches": "grouped"}, "`lenvm_batches` must be one of shuffled, by_prompt, got 'grouped'"),
        ({"lenvm_target": "length", "lenvm_lambda": 0.9}, "only the discounted return obeys, but `lenvm_target` is"),
        ({"lenvm_target": "length", "lenvm_censored": "bootstrap"}, "`lenvm_censored: bootstrap` bootstraps with"),
        (
            {"lenvm_batches": "by_prompt", "train_sampling_strategy": "group_by_length"},
            "`lenvm_batches: by_prompt` with `train_sampling_strategy`: both decide the order of the rows",
        ),
        ({"lenvm_shared_prefix": True}, "`lenvm_shared_prefix` without `lenvm_batches: by_prompt`"),
        ({"lenvm_max_length": 1}, "`lenvm_max_length` must be a whole number of tokens, 2 or more, got 1"),
        (
            {"stage": "sft", "dataset": "chat", "lenvm_gamma": 0.9},
            "`lenvm_gamma` belong(s) to `stage: lenvm`, but the stage is 'sft'",
        ),
        ({"packing": True}, "does not support `packing`"),
        ({"neat_packing": True, "train_sampling_strategy": "group_by_length"}, "`neat_packing` with `train_sampling"),
        ({"neat_packing": True, "lenvm_batches": "by_prompt"}, "`neat_packing` with `lenvm_batches: by_prompt`"),
        ({"streaming": True}, "does not support `streaming` with `lenvm_gamma: auto` or without `lenvm_max_length`"),
        ({**STREAM, "dataloader_num_workers": 0}, "does not support `streaming` with `dataloader_num_workers: 0`"),
        ({**STREAM, "val_size": 3}, "does not support `val_size` with `streaming`"),
        ({**STREAM, "neat_packing": True}, "does not support `streaming` with `neat_packing`"),
        ({"train_on_prompt": True}, "does not support `train_on_prompt` / `mask_history`"),
        ({"finetuning_type": "oft"}, "does not support `finetuning_type: oft`"),
        ({"compute_accuracy": True}, "does not support `compute_accuracy`"),
        ({"shift_attn": True}, "does not support `shift_attn`"),
        ({"add_tokens": "<x>"}, "does not support `resize_vocab` / `add_tokens`"),
        ({"val_size": 0.1, "eval_dataset": "held_out"}, "Cannot specify `val_size` if `eval_dataset` is not None."),
        ({"label_smoothing_factor": 0.1}, "does not support `label_smoothing_factor`"),
        (
            {"do_train": False, "do_eval": True, "eval_dataset": "held_out", "dataset": None},
            "is no length value model and there is nothing to train it on",
        ),
    ],
)
def test_wrong_settings_are_one_sentence(world: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below
        world.fit(world.root / "wrong", **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_length_value_model_is_no_language_model(world: Any, trained: Path) -> None:
    with pytest.raises(ValueError, match="is a length value model, but the stage is 'sft'; add `stage: lenvm`"):
        world.fit(world.root / "wrong", model_name_or_path=str(trained), stage="sft", dataset="chat")


@pytest.mark.slow
def test_bad_data_stops_the_run_with_the_rows(world: Any) -> None:
    world.add("bad", [*world.train_rows, "{", {"prompt_token_ids": "x"}, {"finish_reason": 3}, {}])
    with pytest.raises(
        ValueError, match=r"training set: 4 of 52 rows cannot be used .* row 49: not JSON.* more than 5%"
    ):
        world.fit(world.root / "bad", dataset="bad")
