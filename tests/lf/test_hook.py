"""How the plug-in gets into the host, and that it stays out of everybody else's way."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lenvm_lf import _hook, seams

ROOT = Path(__file__).resolve().parents[2]
SFT = {"stage": "sft", "dataset": "chat", "max_steps": 4, "seed": 3}


def outcome(output: Path) -> tuple[bytes, list[Any]]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    logged = [{k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k} for e in history]
    return (output / "model.safetensors").read_bytes(), logged


@pytest.mark.slow
def test_plain_sft_is_bit_identical_with_without_and_switched_off(world: Any) -> None:
    without = outcome(world.train(world.root / "sft_none", route="none", **SFT))
    assert outcome(world.train(world.root / "sft_pth", route="pth", **SFT)) == without
    off = world.train(world.root / "sft_off", route="pth", env={"LENVM_LF_DISABLE": "1"}, **SFT)
    assert outcome(off) == without
    assert len(without[1]) == 5


@pytest.mark.slow
def test_broken_seam_is_a_clear_error_and_leaves_plain_sft_alone(world: Any) -> None:
    done = world.run(world.settings(world.root / "broken"), route="broken")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "stage `lenvm` cannot hook into this LlamaFactory: llamafactory.model.loader: `load_model` takes" in last
    assert "expected ('everything',)" in last
    assert "Install llamafactory>=0.9.5,<0.9.6" in last
    world.train(world.root / "broken_sft", route="broken", **SFT)


def test_another_host_version_is_refused_only_to_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams.metadata, "version", lambda name: "0.9.6")
    monkeypatch.setattr(seams, "PROBLEMS", [])
    tuner: Any = types.ModuleType("llamafactory.train.tuner")
    tuner._training_function = lambda config: "the host's own"
    seams.apply(tuner)
    assert tuner._training_function({"args": {"stage": "sft"}}) == "the host's own"
    with pytest.raises(
        seams.SeamError, match=r"llamafactory 0\.9\.6 is outside the supported range >=0\.9\.5,<0\.9\.6"
    ):
        tuner._training_function({"args": {"stage": "lenvm"}})


@pytest.mark.slow
def test_explicit_route_in_torchrun_ranks_equals_one_process(world: Any) -> None:
    """`lenvm-train` without the .pth, two ranks on gloo = one process with accumulation 2, step by step (Eq. 9)."""

    common = {"disable_shuffling": True, "max_steps": 3, "learning_rate": 3e-4, "logging_steps": 1}
    common |= {
        "eval_dataset": "held_out",
        "do_eval": True,
        "per_device_eval_batch_size": 4,
    }  # 15 rows: an odd last batch
    one = world.fit(world.root / "acc2", per_device_train_batch_size=6, gradient_accumulation_steps=2, **common)
    env = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    two = world.train(
        world.root / "ddp", route="explicit", env=env, per_device_train_batch_size=6, ddp_backend="gloo", **common
    )
    for key in ("loss", "value_loss", "length_nll", "grad_norm"):
        assert world.steps(two, key) == pytest.approx(world.steps(one, key), rel=2e-5), key
    found, wanted = (json.loads((run / "eval_results.json").read_text()) for run in (two, one))
    for key in wanted.keys() - {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}:
        assert found[key] == pytest.approx(wanted[key], rel=2e-3), key


def interpreter(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**{k: v for k, v in os.environ.items() if k != _hook.DISABLE}, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hook_is_cheap_and_can_be_switched_off(world: Any) -> None:
    site = {"PYTHONPATH": f"{ROOT}:{world.sites['pth']}"}
    loaded = (
        "import sys; print('lenvm_lf._hook' in sys.modules, "
        "any(f.__module__ == 'lenvm_lf._hook' for f in sys.meta_path), 'torch' in sys.modules, 'lenvm' in sys.modules)"
    )
    assert interpreter(loaded, **site) == "True True False False"
    assert interpreter(loaded, **site, LENVM_LF_DISABLE="1").split()[1] == "False"


def test_start_file_names_the_same_entry_point() -> None:
    """PEP 829 (Python >= 3.15): `module:callable`, imported and called."""
    module, name = (ROOT / "lenvm_lf" / "lenvm_lf.start").read_text().strip().split(":")
    assert getattr(importlib.import_module(module), name) is _hook.install


def test_explicit_command_respects_the_off_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    from lenvm_lf import cli

    monkeypatch.setenv(_hook.DISABLE, "1")
    with pytest.raises(SystemExit, match="LENVM_LF_DISABLE is set"):
        cli.main()


def test_installing_after_the_host_is_reported() -> None:
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if f.__module__ != 'lenvm_lf._hook']\n"
        "import types; sys.modules['llamafactory.train.tuner'] = types.ModuleType('x')\n"
        "from lenvm_lf import _hook, seams; _hook.install(); print(seams.PROBLEMS[0])"
    )
    assert interpreter(code) == (
        "llamafactory.train.tuner: imported before lenvm_lf was installed; install lenvm_lf first"
    )


def test_seams_are_those_of_the_tested_host(world: Any) -> None:
    """The source of every touched function is the one this plug-in was written against."""
    for name, group in seams.SEAMS.items():
        module = importlib.import_module(name)
        for seam in group:
            function = getattr(module, seam.function)
            original = getattr(function, "__wrapped__", function)
            found = seams.source_hash(original)
            assert found == seam.sha256, (
                f"LlamaFactory changed {name}.{seam.function}: read what is new, adapt lenvm_lf/seams.py, then record "
                f"the hash {found} there"
            )
    assert not seams.PROBLEMS
    seams.check(complete=True)


def test_what_the_plugin_calls_takes_what_it_is_given(world: Any) -> None:
    """Public functions of the host that are called, not wrapped: the arguments they are called with still exist."""
    calls = {
        "llamafactory.data:MultiModalDataCollatorForSeq2Seq": "template processor model tokenizer label_pad_token_id",
        "llamafactory.data:get_template_and_fix_tokenizer": "tokenizer data_args",
        "llamafactory.data.template:Template.encode_oneturn": "tokenizer messages system tools",
        "llamafactory.data.template:Template.get_stop_token_ids": "tokenizer",
        "llamafactory.data.mm_plugin:Qwen2VLPlugin.process_messages": "messages images videos audios processor",
        "llamafactory.data.mm_plugin:Qwen3VLPlugin.process_messages": "messages images videos audios processor",
        "llamafactory.data.converter:register_dataset_converter": "name dataset_converter",
        "llamafactory.extras.ploting:plot_loss": "save_dictionary keys",
        "llamafactory.train.trainer_utils:create_custom_optimizer": "model training_args finetuning_args",
        "llamafactory.train.trainer_utils:create_custom_scheduler": "training_args num_training_steps optimizer",
        "llamafactory.train.trainer_utils:create_modelcard_and_push": "trainer model_args data_args training_args",
        "llamafactory.train.callbacks:SaveProcessorCallback": "processor",
    }
    for place, arguments in calls.items():
        module, _, path = place.partition(":")
        function: Any = importlib.import_module(module)
        for name in path.split("."):
            function = getattr(function, name)
        missing = set(arguments.split()) - set(inspect.signature(function).parameters)
        assert not missing, (
            f"LlamaFactory changed {module}.{path}: it no longer takes {missing}, which lenvm_lf gives it"
        )


def test_a_changed_function_is_named_at_start(
    world: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same signature with another body: the stage runs, and says which function to look at."""
    name = "llamafactory.model.loader"
    seam = seams.SEAMS[name][0]
    monkeypatch.setitem(seams.SEAMS, name, (seams.Seam(seam.function, seam.parameters, "0" * 16),))
    monkeypatch.setattr(seams, "CHANGED", [])
    seams._check_module(importlib.import_module(name))
    with caplog.at_level("WARNING"):
        seams.check(complete=True)
    assert (
        "llamafactory.model.loader.load_model: signature as in the tested LlamaFactory 0.9.5, source not" in caplog.text
    )


def test_a_module_that_was_never_hooked_is_found(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "APPLIED", seams.APPLIED - {"llamafactory.model.loader"})
    with pytest.raises(seams.SeamError, match=r"llamafactory\.model\.loader: was never imported by the host"):
        seams.check(complete=True)


def test_a_missing_name_is_found(world: Any) -> None:
    module = types.ModuleType("llamafactory.extras.constants")
    with pytest.raises(seams.SeamError, match="it has no `TRAINING_STAGES`"):
        seams._check_module(module)


def test_stage_is_found_in_words_and_in_yaml() -> None:
    assert seams.asks_for_stage({"stage": "lenvm"})
    assert not seams.asks_for_stage({"stage": "sft"})
    assert seams.asks_for_stage(["--do_train", "--stage", "lenvm"])
    assert seams.asks_for_stage(["--stage=lenvm"])
    assert not seams.asks_for_stage(["--stage", "sft", "lenvm"])
    assert not seams.asks_for_stage(None)
