"""The path of a GPU, kernels and all, says what the CPU's path says: Triton's interpreter in the host's scheduler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Qwen2Config

from tests.sglang.models import make_attached, make_lookahead, make_pair, make_vision_pair
from tests.sglang.paths import ASKED, BROKEN, STEERED

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def answers(base: Path, lenvm: Path, *words: str, **variables: str) -> list[list[int]]:
    command = [sys.executable, "-m", "tests.sglang.paths", str(base), str(lenvm), *words]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("kind", ["full", "attached"])
def test_the_path_of_a_gpu_gives_the_same_answers(kind: str, tmp_path: Path) -> None:
    pair = make_pair(tmp_path, Qwen2Config, Qwen2Config)
    lenvm = pair / "lenvm" if kind == "full" else make_attached(tmp_path / "attached", pair / "base", "table")
    cpu = answers(pair / "base", lenvm)
    assert len(cpu[5]) == ASKED[5]["length_target"]  # strict
    assert len(set(map(tuple, cpu))) > len(ASKED) // 2
    word = "graphs" if kind == "full" else "fused"  # an attached head has no forward
    assert answers(pair / "base", lenvm, word, TRITON_INTERPRET="1") == cpu
    if kind == "full":
        # every row is steered, so the host's sampler is passed by, until for one row there is nothing to pass it with
        broken, whole = answers(pair / "base", lenvm, "broken"), cpu[len(ASKED) :][:STEERED]
        assert len(broken.pop(BROKEN)) == 1 < len(whole.pop(BROKEN))
        assert broken == whole
        again = answers(pair / "base", lenvm, "broken", "graphs", TRITON_INTERPRET="1")
        assert len(again.pop(BROKEN)) == 1
        assert again == whole
        assert answers(pair / "base", lenvm, "parts") == cpu
        few = answers(pair / "base", lenvm, "few")
        assert answers(pair / "base", lenvm, "fused", "few", TRITON_INTERPRET="1") == few
        assert answers(pair / "base", lenvm, "host", "few", TRITON_INTERPRET="1") == few


def test_the_hosts_kernels_for_a_gpu_give_the_same_answers(tmp_path: Path) -> None:
    """Candidates as decode rows of SGLang's Triton attention, whole sequences in its extend kernel."""
    pair = make_pair(tmp_path, Qwen2Config, Qwen2Config)
    few = answers(pair / "base", pair / "lenvm", "few")
    assert [len(answer) for answer in few] == [5, 5, 3, 3]
    assert answers(pair / "base", pair / "lenvm", "triton", "few", TRITON_INTERPRET="1") == few


def test_the_path_of_a_gpu_looks_ahead_to_the_same_answers(tmp_path: Path) -> None:
    """A lookahead head on a LenVM, which reads one token a row."""
    pair = make_pair(tmp_path, Qwen2Config, Qwen2Config)
    lenvm = make_lookahead(tmp_path / "lookahead", pair / "lenvm")
    assert answers(pair / "base", lenvm, "graphs", TRITON_INTERPRET="1") == answers(pair / "base", lenvm)
    few = answers(pair / "base", lenvm, "few")
    assert answers(pair / "base", lenvm, "fused", "few", TRITON_INTERPRET="1") == few


def test_where_our_attention_is_unfit_the_hosts_gives_the_same_answers(tmp_path: Path) -> None:
    """On a CPU, over candidates and for the one token that a lookahead head on a LenVM reads."""
    pair = make_pair(tmp_path, Qwen2Config, Qwen2Config)
    for lenvm in (pair / "lenvm", make_lookahead(tmp_path / "lookahead", pair / "lenvm")):
        few = answers(pair / "base", lenvm, "few")
        assert [len(answer) for answer in few] == [5, 5, 3, 3]
        assert answers(pair / "base", lenvm, "few", "unfit") == few


def test_graphs_of_a_model_that_reads_images_give_the_same_answers(tmp_path: Path) -> None:
    """Its rotary positions have memory of their own."""
    pair = make_vision_pair(tmp_path, "Qwen2_5_VL", "Qwen2_5_VL")
    few = answers(pair / "base", pair / "lenvm", "few", "images")
    assert answers(pair / "base", pair / "lenvm", "graphs", "few", "images", TRITON_INTERPRET="1") == few


def test_graphs_of_a_model_without_a_length_head_give_the_same_answers(tmp_path: Path) -> None:
    """The distribution around its value is made inside them."""
    pair = make_pair(tmp_path, Qwen2Config, Qwen2Config, heads=1)
    few = answers(pair / "base", pair / "lenvm", "few")
    assert answers(pair / "base", pair / "lenvm", "graphs", "few", TRITON_INTERPRET="1") == few
