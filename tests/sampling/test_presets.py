"""Presets against rows in the schemas of the data sets' cards."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from lenvm import instructions
from lenvm.cli import main
from lenvm.sampling.presets import PRESETS

CHAT = [
    {"content": "Write a poem.", "role": "user", "language": "English", "toxic": False},
    {"content": "No.", "role": "assistant", "language": "English", "toxic": False},
]


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, "PNG")
    return data.getvalue()


ROWS = {
    "gsm8k": {"question": "1 + 1?", "answer": "2 #### 2"},
    "math": {"problem": "1 + 1?", "level": "Level 1", "type": "Algebra", "solution": r"\boxed{2}"},
    "deepmath": {"question": "1 + 1?", "final_answer": "2", "difficulty": 1.0, "topic": "sums",
                 "r1_solution_1": "long"},
    "wildchat": {"conversation_id": "c", "model": "m", "conversation": CHAT, "turn": 1, "language": "English",
                 "toxic": False, "redacted": False},
    "opencodereasoning-2": {"id": "i", "question_id": "q", "question": "Print 2.", "r1_generation": "long",
                            "source": "s", "dataset": "taco", "split": "train", "index": "0", "difficulty": "EASY"},
    "r1-onevision": {"id": "v", "image": base64.b64encode(png()).decode(),
                     "conversations": [{"from": "human", "value": "<image>\nWhat colour?"},
                                       {"from": "gpt", "value": "Red"}]},
}  # fmt: skip
MATH_CHAT = [{"role": "user", "content": f"{instructions.MATH}\n\n1 + 1?"}]
WANTED = {
    "gsm8k": (MATH_CHAT, {"answer": "2 #### 2"}),
    "math": (MATH_CHAT, {"level": "Level 1", "type": "Algebra", "solution": r"\boxed{2}"}),
    "deepmath": (MATH_CHAT, {"final_answer": "2", "difficulty": 1.0, "topic": "sums"}),
    "wildchat": (
        [{"role": "user", "content": f"{instructions.FOLLOW}\n\nWrite a poem."}],
        {"language": "English", "toxic": False, "redacted": False},
    ),
    "opencodereasoning-2": (
        [{"role": "user", "content": f"{instructions.CODE}\n\nPrint 2."}],
        {"question_id": "q", "source": "s", "dataset": "taco", "difficulty": "EASY"},
    ),
}


@pytest.fixture
def draw(tmp_path: Path, url: str, tokenizer_dir: Path):
    """Run `lenvm sample` over a copy of a data set's repository; returns (rows, exit code, what it printed)."""

    def run(rows: list[dict], *options: str, file: str = "data/train-00000-of-00001.parquet"):
        path = tmp_path / "set" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        out = tmp_path / "out.jsonl"
        words = ["sample", str(tmp_path / "set"), "--out", str(out), "--server", url, "--tokenizer", str(tokenizer_dir)]
        done = CliRunner().invoke(main, [*words, "--n", "1", "--max-tokens", "8", *options])
        drawn = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
        return drawn, done.exit_code, done.output

    return run


@pytest.mark.parametrize("name", WANTED)
def test_a_preset_asks_with_the_papers_words_and_keeps_what_it_names(draw, name: str):
    (row,), code, shown = draw([ROWS[name], ROWS[name]], "--preset", name)  # a question that occurs twice is asked once
    assert code == 0, shown
    assert (row["messages"], row["meta"]) == WANTED[name]


def test_a_preset_with_images_unpacks_them(tmp_path: Path):
    from lenvm.sampling.commands import _reading
    from lenvm.sampling.prompts import read_prompts

    path = tmp_path / "ai2d" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist([ROWS["r1-onevision"]]), path)
    reading = _reading(tmp_path, tmp_path / "out.jsonl", "r1-onevision", "", None, False, False, None, None, None)
    (prompt,) = read_prompts(tmp_path, reading=reading)
    text = {"type": "text", "text": f"\n{instructions.MATH}\n\nWhat colour?"}
    assert prompt.id == "v"
    assert prompt.messages == [{"role": "user", "content": [{"type": "image"}, text]}]
    assert prompt.images[0].path.read_bytes() == png()
    assert prompt.images[0].path.parent == tmp_path / "out_images"
    assert prompt.meta == {}


def test_every_preset_has_a_row_here():
    assert set(ROWS) == set(PRESETS)


def test_options_go_before_the_preset(draw):
    row = {**ROWS["gsm8k"], "extra": 7}
    (got,), code, shown = draw([row], "--preset", "gsm8k", "--instruction", "", "--meta", "extra")
    assert code == 0, shown
    assert got["messages"] == [{"role": "user", "content": "1 + 1?"}]
    assert got["meta"] == {"extra": 7}


def test_only_the_presets_split_is_read(draw):
    other = {**ROWS["opencodereasoning-2"], "question": "In C++."}
    draw([other], file="train/cpp-00000-of-00001.parquet")
    rows, code, shown = draw(
        [ROWS["opencodereasoning-2"]], "--preset", "opencodereasoning-2", file="train/python-00000-of-00001.parquet"
    )
    assert code == 0, shown
    assert [r["messages"][0]["content"].endswith("Print 2.") for r in rows] == [True]


def test_what_a_preset_cannot_use_is_said(draw, tmp_path: Path):
    rows, code, shown = draw([{**ROWS["opencodereasoning-2"], "question": "-"}], "--preset", "opencodereasoning-2")
    assert (rows, code) == ([], 1)
    assert "comes without its questions" in " ".join(shown.split())
    _, code, shown = draw([ROWS["gsm8k"]], "--preset", "gsm9k")
    assert code == 1
    assert "--preset knows gsm8k, math," in " ".join(shown.split())
    file = tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    done = CliRunner().invoke(main, ["sample", str(file), "--split", "test", "--out", str(tmp_path / "x.jsonl")])
    assert done.exit_code == 1
    assert "--split chooses among the files of a directory" in " ".join(done.output.split())
