"""Prompts from parquet, datasets' directories and JSONL with other names; duplicates; first turns."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from lenvm.cli import main
from lenvm.sampling.errors import SamplingError
from lenvm.sampling.prompts import Reading, prompts_hash, read_prompts

QUESTIONS = {
    "uuid": [f"u{i}" for i in range(5)],
    "question": ["one?", "two?", "one?", "three?", "four?"],
    "level": [1, 2, 1, 3, 4],
    "when": [datetime.date(2026, 1, i + 1) for i in range(5)],
}
COLUMNS = {"id": "uuid", "prompt": "question"}


@pytest.fixture(params=["parquet", "arrow", "folder", "jsonl"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same five rows in each format."""
    table = pa.table(QUESTIONS)
    if request.param == "parquet":
        pq.write_table(table, tmp_path / "q.parquet")
        return tmp_path / "q.parquet"
    if request.param == "jsonl":
        rows = [{k: str(v[i]) if k == "when" else v[i] for k, v in QUESTIONS.items()} for i in range(5)]
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / "q.jsonl"
    folder = tmp_path / "set"
    if request.param == "folder":  # a copy of a dataset repository
        (folder / "data").mkdir(parents=True)
        pq.write_table(table.slice(0, 3), folder / "data" / "train-00000-of-00002.parquet")
        pq.write_table(table.slice(3), folder / "data" / "train-00001-of-00002.parquet")
        return folder
    folder.mkdir()  # what save_to_disk of `datasets` writes
    for number, part in enumerate((table.slice(0, 2), table.slice(2))):
        name = str(folder / f"data-{number:05d}-of-00002.arrow")
        with pa.OSFile(name, "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(part)
    (folder / "cache-123.arrow").write_bytes(b"not data")
    (folder / "state.json").write_text("{}")
    return folder


def test_every_format_gives_the_same_prompts(source: Path):
    prompts = read_prompts(source, reading=Reading(COLUMNS, instruction="Think."))
    assert [p.id for p in prompts] == ["u0", "u1", "u2", "u3", "u4"]
    assert prompts[1].messages == [{"role": "user", "content": "Think.\n\ntwo?"}]
    assert prompts[3].meta == {"level": 3, "when": "2026-01-04"}
    assert [p.id for p in read_prompts(source, 3, Reading(COLUMNS, deduplicate=True))] == ["u0", "u1", "u3"]


def test_rows_without_an_id_are_numbered_and_a_system_message_comes_first(tmp_path: Path):
    pq.write_table(pa.table({"q": ["a", "b"], "s": ["Be kind.", None]}), tmp_path / "q.parquet")
    prompts = read_prompts(tmp_path / "q.parquet", reading=Reading({"prompt": "q", "system": "s"}))
    assert [p.id for p in prompts] == ["0", "1"]
    assert [m["role"] for m in prompts[0].messages] == ["system", "user"]
    assert prompts[1].messages == [{"role": "user", "content": "b"}]


def test_the_first_turn_of_a_conversation(tmp_path: Path):
    chat = [{"role": "user", "content": "hi", "lang": "en"}, {"role": "assistant", "content": "ho", "lang": "en"}]
    pq.write_table(pa.table({"conversation": [chat]}), tmp_path / "w.parquet")
    columns = {"messages": "conversation"}
    (first,) = read_prompts(tmp_path / "w.parquet", reading=Reading(columns, first_turn=True))
    assert first.messages == [{"role": "user", "content": "hi"}]
    with pytest.raises(SamplingError, match=r"row 1: the last message is the assistant's.*--first-turn"):
        read_prompts(tmp_path / "w.parquet", reading=Reading(columns))


def test_what_is_wrong_is_named_with_file_and_row(tmp_path: Path):
    path = tmp_path / "q.parquet"
    pq.write_table(pa.table({"uuid": ["a", "a"], "question": ["x", ""]}), path)
    with pytest.raises(SamplingError, match=r"q\.parquet, row 1 must be .* `id` and `messages`, got question, uuid"):
        read_prompts(path)
    with pytest.raises(SamplingError, match=r"row 2: `question` must be a text, got ''"):
        read_prompts(path, reading=Reading(COLUMNS))
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(SamplingError, match="is no parquet file"):
        read_prompts(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SamplingError, match=r"holds no \.arrow, \.parquet or \.jsonl file"):
        read_prompts(tmp_path / "empty")
    with pytest.raises(SamplingError, match="got 'answer'"):
        Reading({"answer": "x"})
    with pytest.raises(SamplingError, match="either `messages` or `prompt`"):
        Reading({"messages": "a", "prompt": "b"})
    pq.write_table(pa.table({"id": ["a"], "q": ["x"], "image": [b"\x00"]}), path)
    with pytest.raises(SamplingError, match="type bytes cannot travel"):
        read_prompts(path, reading=Reading({"prompt": "q"}))


def test_the_splits_of_a_dataset_are_not_mixed(tmp_path: Path):
    for name, ids in (("train-00000-of-00001", ["a", "b"]), ("test-00000-of-00001", ["c"])):
        pq.write_table(pa.table({"id": ids, "q": ["x"] * len(ids)}), tmp_path / f"{name}.parquet")
    reading = Reading({"prompt": "q"})
    with pytest.raises(SamplingError, match=r"holds the splits test, train; name one with --split"):
        read_prompts(tmp_path, reading=reading)
    assert [p.id for p in read_prompts(tmp_path, reading=Reading({"prompt": "q"}, split="test"))] == ["c"]
    with pytest.raises(SamplingError, match=r"has no split 'dev', it has test, train"):
        read_prompts(tmp_path, reading=Reading({"prompt": "q"}, split="dev"))


def test_the_hash_of_the_prompts_is_that_of_one_json_list(prompts_file: Path):
    import hashlib

    prompts = read_prompts(prompts_file)
    text = json.dumps([[p.id, p.messages] for p in prompts], sort_keys=True, ensure_ascii=False)
    assert prompts_hash(prompts) == hashlib.sha256(text.encode()).hexdigest()


def test_the_command_takes_a_column_map(tmp_path: Path, url: str, tokenizer_dir: Path):
    pq.write_table(pa.table(QUESTIONS), tmp_path / "q.parquet")
    words = ["sample", str(tmp_path / "q.parquet"), "--out", str(tmp_path / "o.jsonl"), "--server", url, "--tokenizer",
             str(tokenizer_dir), "--n", "2", "--max-tokens", "20"]  # fmt: skip
    done = CliRunner().invoke(main, [*words, "--columns", "id=uuid, prompt=question", "--deduplicate"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [r["prompt_id"] for r in rows] == [p for p in ("u0", "u1", "u3", "u4") for _ in range(2)]
    assert rows[0]["meta"]["level"] == 1
    wrong = CliRunner().invoke(main, [*words, "--columns", "question"])
    assert wrong.exit_code == 2
    assert "name=column" in wrong.output
