"""The demo's comparisons run end to end, one step each, on the tiny world."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("ablations", ROOT / "examples" / "demo" / "ablations.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_subset_keeps_prompts_and_samples() -> None:
    rows = [json.dumps({"prompt_id": f"p{i % 8}", "sample": i // 8}) + "\n" for i in range(40)]
    found = [json.loads(row) for row in load_script().subset(rows, 2, 0.25)]
    assert len({row["prompt_id"] for row in found}) == 2
    assert [row["sample"] for row in found] == [0, 1, 0, 1]
    assert sorted(load_script().subset(rows, None, 1.0)) == sorted(rows)


@pytest.mark.slow
def test_one_command_gives_table_and_plot(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    demo, out = world.root / "demo", world.root / "ablations"
    (demo / "samples").mkdir(parents=True)
    (demo / "base").symlink_to(world.base)
    for name, source in (("train", "train"), ("val", "held_out")):
        (demo / "samples" / f"{name}.jsonl").symlink_to(world.data / f"{source}.jsonl")
    words = [str(demo), "--out", str(out), "--steps", "1", "--only", "weighting", "samples per prompt"]
    words += ["--set", "preprocessing_num_workers=1", "learning_rate=0.03"]
    script = load_script()
    script.GROUPS["samples per prompt"].pop("4")
    script.GROUPS["samples per prompt"].pop("2")
    script.main(words)
    with (out / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["varied"], row["choice"]) for row in table] == [
        ("weighting", "token (reference)"), ("weighting", "trajectory"),
        ("samples per prompt", "4 (reference)"), ("samples per prompt", "1"),
    ]  # fmt: skip
    assert table[0]["MAE"] == table[2]["MAE"], "the default is trained once"
    assert len({row["MAE"] for row in table}) == 3
    assert (out / "figures.png").stat().st_size > 10_000
    with (out / "scaling" / "table.csv").open() as file:
        assert [(row["axis"], row["size"]) for row in csv.DictReader(file)] == [
            ("samples per prompt", "1"), ("samples per prompt", "4"),
        ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "trajectory" in printed and "length_mae of each training" in printed
