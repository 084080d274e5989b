"""Reasons not to start: one clear sentence, a non-zero exit, nothing spawned."""

from __future__ import annotations

import json
import pkgutil
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lenvm_sglang import OFF_SWITCH, versions
from lenvm_sglang.settings import REFUSALS, Settings, StartError, check_checkpoint, refuse_settings, settings_from
from lenvm_sglang.versions import host
from lenvm_sglang.worker import SLOT_BACKENDS, refuse_pages
from tests.sglang.conftest import COMMON, ROOT, environment
from tests.sglang.models import CONTEXT, tokenizer
from tests.sglang.plugins import install

pytestmark = pytest.mark.floor

BAD_VALUES = {
    "pp_size": 2, "speculative_algorithm": "EAGLE", "attn_dp_size": 2, "disaggregation_mode": "prefill",
    "tokenizer_worker_num": 2, "dcp_size": 2, "attn_cp_size": 2, "dllm_algorithm": "x",
    "elastic_ep_backend": "x", "grpc_port": 1, "dp_size": 2, "rl_on_policy_target": "fsdp",
}  # fmt: skip


ALL_REFUSALS = (*REFUSALS, *host().refusals)


@pytest.mark.parametrize("field", [r.field for r in ALL_REFUSALS])
def test_unsupported_settings_are_named(field: str) -> None:
    good = {r.field: r.allowed[0] for r in ALL_REFUSALS}
    refuse_settings(SimpleNamespace(**good), host().refusals)
    with pytest.raises(StartError, match=field):
        refuse_settings(SimpleNamespace(**{**good, field: BAD_VALUES.get(field, True)}), host().refusals)


def test_pages_need_a_backend_that_reads_single_slots() -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    assert set(SLOT_BACKENDS) <= set(ATTENTION_BACKENDS)
    refuse_pages(1, ("trtllm_mha", "trtllm_mha"))
    refuse_pages(64, ("fa3", "flashinfer"))
    with pytest.raises(StartError, match=r"page_size=64 .* got 'trtllm_mha'; run with --page-size 1"):
        refuse_pages(64, ("fa3", "trtllm_mha"))


def test_refused_settings_exist_in_this_host() -> None:
    from sglang.srt.server_args import ServerArgs

    assert {r.field for r in ALL_REFUSALS} <= set(ServerArgs.__struct_fields__)


def test_what_a_supported_version_lacks_is_a_hook() -> None:
    """`versions.SUPPORTED` speaks of hooks that exist, and of this host the truth."""
    from lenvm_sglang import seams

    targets = {target for target, _, _ in seams.HOOKS}
    for version in versions.SUPPORTED.values():
        assert version.lacks <= targets
    for target in host().lacks:
        with pytest.raises(AttributeError):
            pkgutil.resolve_name(target)


def test_flags() -> None:
    assert settings_from({}) is None
    assert settings_from({"lenvm_model": "x", "lenvm_min_entropy": None}) == Settings("x", 16)
    assert settings_from({"lenvm_model": "x", "lenvm_candidate_mass": 0.9}) == Settings("x", candidate_mass=0.9)
    with pytest.raises(StartError, match="--lenvm-max-candidates needs --lenvm-model"):
        settings_from({"lenvm_max_candidates": 8})
    for option, value, message in (
        ("max_candidates", 1, "between 2 and 256, got 1"),
        ("candidate_mass", 0.0, "above 0 and at most 1"),
        ("candidate_mass", float("nan"), "got nan"),
        ("min_entropy", -0.1, "at least 0"),
        ("min_entropy", float("inf"), "got inf"),
    ):
        with pytest.raises(StartError, match=message):
            settings_from({"lenvm_model": "x", f"lenvm_{option}": value})


def edited(pair: Path, target: Path, **changes: Any) -> Path:
    """A copy of the LenVM with another config.json."""
    shutil.copytree(pair / "lenvm", target)
    path = target / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def test_checkpoints(pair: Path, tmp_path: Path) -> None:
    base = str(pair / "base")
    assert check_checkpoint(Settings(str(pair / "lenvm")), base, CONTEXT).gamma == 0.97
    cases = {
        str(tmp_path / "nowhere"): "not a length value model",
        base: "no `lenvm` block",
        str(edited(pair, tmp_path / "arch", architectures=["Qwen2ForCausalLM"])): "ForLengthValue",
        str(edited(pair, tmp_path / "gamma", lenvm={"gamma": 1.5})): "gamma",
        str(edited(pair, tmp_path / "format", lenvm={"gamma": 0.9, "heads": ["value"], "format": 9})): "format 9",
        str(edited(pair, tmp_path / "short", max_position_embeddings=100)): "--context-length 100",
    }
    for directory, message in cases.items():
        with pytest.raises(StartError, match=message):
            check_checkpoint(Settings(directory), base, CONTEXT)


def test_another_tokenizer(pair: Path, tmp_path: Path) -> None:
    other = edited(pair, tmp_path / "other")
    tokenizer("entirely different words here").save_pretrained(other)
    with pytest.raises(StartError, match="another tokenizer"):
        check_checkpoint(Settings(str(other)), str(pair / "base"), CONTEXT)
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(StartError, match="cannot be read"):
        check_checkpoint(Settings(str(other)), str(pair / "base"), CONTEXT)
    for file in other.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(StartError, match="has no tokenizer"):
        check_checkpoint(Settings(str(other)), str(pair / "base"), CONTEXT)


def test_unknown_backbone() -> None:
    from lenvm_sglang.model import check_architecture

    check_architecture("Qwen3ForLengthValue")
    with pytest.raises(StartError, match="no MadeUpForCausalLM"):
        check_architecture("MadeUpForLengthValue")


def test_host_version_and_missing_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang

    from lenvm_sglang import seams

    monkeypatch.setattr(sglang, "__version__", "0.4.0")
    with pytest.raises(seams.SeamError, match=r"0\.5\.21, .*0\.5\.23, this is 0\.4\.0"):
        seams.install()
    monkeypatch.undo()
    monkeypatch.setattr(seams, "HOOKS", (("sglang.srt.server_args.ServerArgs.gone", "AFTER", print), *seams.HOOKS))
    with pytest.raises(seams.SeamError, match=r"ServerArgs\.gone"):
        seams.install()


def test_what_stands_in_for_the_hosts_sampler_is_looked_for_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.sampler import Sampler

    from lenvm_sglang import seams

    monkeypatch.delattr(Sampler, "_sync_token_ids_across_tp")
    with pytest.raises(seams.SeamError, match=r"has no .*Sampler\._sync_token_ids_across_tp"):
        seams.install()


@pytest.mark.parametrize(
    ("part", "fronts", "schedulers"),
    [
        ("sglang.srt.entrypoints.engine", True, True),
        ("sglang.srt.managers.scheduler", False, True),
        ("sglang.srt.managers.detokenizer_manager", False, False),
        ("sglang", True, True),  # `sglang serve` loads plug-ins before anything else
    ],
)
def test_each_process_gets_its_own_hooks(
    monkeypatch: pytest.MonkeyPatch, part: str, fronts: bool, schedulers: bool
) -> None:
    from lenvm_sglang import seams

    monkeypatch.setattr(seams, "sys", SimpleNamespace(modules={part: None}))
    hooks = set(seams.hooks_here())
    ours = {hook for hook in seams.SCHEDULER_HOOKS if hook[0] not in host().lacks}
    assert set(seams.FRONT_END_HOOKS) <= hooks if fronts else not hooks & set(seams.FRONT_END_HOOKS)
    assert ours <= hooks if schedulers else not hooks & set(seams.SCHEDULER_HOOKS)


def test_a_hook_that_did_not_take_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from lenvm_sglang import seams

    monkeypatch.setattr(seams.process, "hooks", (("sglang.srt.server_args.ServerArgs.url", "AFTER", print),))
    with pytest.raises(seams.SeamError, match=r"ServerArgs\.url"):
        seams.verify()


@pytest.mark.slow
def test_the_process_ends_with_the_sentence(pair: Path, tmp_path: Path) -> None:
    launchers = {
        "python -m": ("-m", "sglang.launch_server"),
        "serve": ("-c", "from sglang.cli.main import main; main()", "serve"),
    }
    without_a_seam = {"PYTHONPATH": f"{ROOT}:{install(tmp_path, 'unhooked')}"}
    runs = [
        (launchers["python -m"], (str(pair / "base"),), {}, 1, "^lenvm: .*no `lenvm` block"),
        (launchers["serve"], (str(pair / "lenvm"), "--enable-mixed-chunk"), {}, 1, "^lenvm: .*enable_mixed_chunk"),
        (
            launchers["serve"],
            (str(pair / "lenvm"),),
            without_a_seam,
            1,
            r"^lenvm: .* no .*Scheduler\.init_memory_pools",
        ),
        (launchers["python -m"], (str(pair / "lenvm"),), {OFF_SWITCH: "1"}, 2, "unrecognized arguments: --lenvm-model"),
    ]

    def run(case: Any) -> tuple[Any, ...]:
        launcher, flags, extra, code, message = case
        command = [sys.executable, *launcher, "--model-path", str(pair / "base"), *COMMON, "--lenvm-model", *flags]
        done = subprocess.run(
            command, env=environment(**extra), capture_output=True, text=True, timeout=280, check=False
        )
        return done.returncode, code, done.stderr, message

    with ThreadPoolExecutor(2) as pool:
        for code, expected, stderr, message in pool.map(run, runs):
            assert code == expected, stderr[-2000:]
            assert re.search(message, stderr.strip().splitlines()[-1]), stderr[-2000:]
