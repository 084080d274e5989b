"""One job in parts: what is merged is what one machine would have written, and nothing is lost or doubled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lenvm.cli import main
from lenvm.sampling.errors import SamplingError
from lenvm.sampling.log import CompletionLog
from lenvm.sampling.shards import Shard, merge
from tests.sampling.conftest import Scripted


@pytest.mark.parametrize("count", [1, 5, 12, 13])
def test_shards_hold_every_item_once_in_order(count: int):
    for of in (1, 2, 3, 5, 12):
        parts = [Shard(i, of).of_list(range(count)) for i in range(1, of + 1)]
        assert [x for part in parts for x in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "2", "a/b", "1/0", "-1/2"])
def test_what_is_no_shard(text: str):
    with pytest.raises(SamplingError, match="1 <= i <= n"):
        Shard.parse(text)
    assert Shard.parse(" 2/4 ") == Shard(2, 4)


def words(prompts_file: Path, out: Path, url: str, tokenizer_dir: Path) -> list[str]:
    return ["sample", str(prompts_file), "--out", str(out), "--server", url, "--tokenizer", str(tokenizer_dir), "--n",
            "3", "--max-tokens", "20", "--retries", "0"]  # fmt: skip


@pytest.fixture
def parts(prompts_file: Path, tmp_path: Path, url: str, tokenizer_dir: Path) -> list[Path]:
    paths = [tmp_path / f"part{i}.jsonl" for i in range(1, 6)]
    for i, path in enumerate(paths, start=1):
        done = CliRunner().invoke(main, [*words(prompts_file, path, url, tokenizer_dir), "--shard", f"{i}/5"])
        assert done.exit_code == 0, done.output
    return paths


def test_merged_shards_are_the_file_of_one_machine(
    parts: list[Path], prompts_file: Path, tmp_path: Path, url: str, tokenizer_dir: Path, script: Scripted
):
    whole, joined = tmp_path / "whole.jsonl", tmp_path / "joined.jsonl"
    assert CliRunner().invoke(main, words(prompts_file, whole, url, tokenizer_dir)).exit_code == 0
    done = CliRunner().invoke(main, ["merge", *map(str, reversed(parts)), "--out", str(joined)])
    assert done.exit_code == 0, done.output
    assert "36 completions" in done.output
    assert joined.read_bytes() == whole.read_bytes()
    sidecars = [json.loads(p.with_name(p.name + ".meta.json").read_text()) for p in (whole, joined)]
    assert sidecars[0] == sidecars[1]
    asked = sum(script.asked.values())
    again = CliRunner().invoke(main, words(prompts_file, joined, url, tokenizer_dir))
    assert "0 drawn" in again.output
    assert script.asked["/generate"] == asked


def test_an_unfinished_shard_is_refused_or_finished_afterwards(
    prompts_file: Path, tmp_path: Path, url: str, tokenizer_dir: Path, script: Scripted
):
    from lenvm.sampling.prompts import read_prompts
    from lenvm.sampling.tokens import PromptTokenizer

    ids = PromptTokenizer(tokenizer_dir).prompt_ids(read_prompts(prompts_file)[7].messages)
    script.refuse = {json.dumps(ids): 400}
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    codes = [CliRunner().invoke(main, [*words(prompts_file, p, url, tokenizer_dir), "--shard", f"{i + 1}/2"]).exit_code
             for i, p in enumerate(paths)]  # fmt: skip
    assert codes == [0, 1]
    out = tmp_path / "joined.jsonl"
    with pytest.raises(SamplingError, match=r"b\.jsonl lacks 3 of 18 completions"):
        merge(paths, out)
    assert not out.exists()
    merged = merge(paths, out, allow_missing=True)
    assert (merged.rows, merged.missing) == (33, 3)
    script.refuse = {}
    done = CliRunner().invoke(main, words(prompts_file, out, url, tokenizer_dir))
    assert "3 drawn" in done.output, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["prompt_id"], r["sample"]) for r in rows] == [(f"p{i}", k) for i in range(12) for k in range(3)]


def test_wrong_parts_are_refused_and_nothing_is_written(parts: list[Path], tmp_path: Path):
    out = tmp_path / "joined.jsonl"
    with pytest.raises(SamplingError, match="of 5 shards number 2, 5 is not here"):
        merge([parts[0], parts[2], parts[3]], out)
    with pytest.raises(SamplingError, match=r"are the same shard, 1/5"):
        merge([parts[0], *parts], out)
    torn = parts[2].read_bytes()
    parts[2].write_bytes(torn[:-1])
    with pytest.raises(SamplingError, match="is no completion"):
        merge(parts, out)
    parts[2].write_bytes(torn + torn.splitlines(keepends=True)[0])
    with pytest.raises(SamplingError, match="repeats sample 0"):
        merge(parts, out)
    parts[2].write_bytes(torn)
    sidecar = parts[1].with_name(parts[1].name + ".meta.json")
    before = json.loads(sidecar.read_text())
    before["parameters"]["temperature"] = 0.5
    sidecar.write_text(json.dumps(before))
    with pytest.raises(SamplingError, match="different runs: temperature differs"):
        merge(parts, out)
    sidecar.unlink()
    with pytest.raises(SamplingError, match=r"part2\.jsonl\.meta\.json is missing"):
        merge(parts, out)
    assert not out.exists()


def test_sorting_a_finished_file_moves_lines_as_they_are(tmp_path: Path):
    path = tmp_path / "o.jsonl"
    rows = [
        {"prompt_id": p, "sample": k, "completion_token_ids": [1] * 40, "text": "é" * k}
        for p in "cab"
        for k in (2, 0, 1)
    ]
    with CompletionLog(path, {"n": 3}) as log:
        for row in rows:
            log.write(row)
        before = set(path.read_bytes().splitlines())
        log.finish(["a", "b", "c"])
    lines = path.read_bytes().splitlines()
    assert set(lines) == before
    assert [(r["prompt_id"], r["sample"]) for r in map(json.loads, lines)] == [(p, k) for p in "abc" for k in range(3)]
