"""`lenvm split`: no prompt in two parts, the same place for ever, and errors that leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lenvm.cli import main
from lenvm.sampling.errors import SamplingError
from lenvm.sampling.split import place, prompt_key, split_samples

runner = CliRunner()


def rows(prompts: int, samples: int = 3) -> list[dict]:
    return [
        {"prompt_id": f"p{p}", "prompt_token_ids": [p, 5, 7], "completion_token_ids": [s, 2], "text": "grün"}
        for s in range(samples)
        for p in range(prompts)
    ]


def write(path: Path, content: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_parts_share_no_prompt_and_lose_no_row(tmp_path: Path):
    source = write(tmp_path / "s.jsonl", rows(200))
    parts = split_samples(source, tmp_path / "out", validation=0.2, test=0.1)
    found = {name: read(part.path) for name, part in parts.items()}
    assert list(found) == ["train", "validation", "test"]
    prompts = {name: {row["prompt_id"] for row in part} for name, part in found.items()}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 200
    assert {name: (part.prompts, part.rows) for name, part in parts.items()} == {
        name: (len(prompts[name]), len(found[name])) for name in found
    }
    assert all(len(found[name]) == 3 * len(prompts[name]) for name in found)
    assert 25 <= len(prompts["validation"]) <= 55 and 10 <= len(prompts["test"]) <= 32
    lines = source.read_bytes().splitlines()
    wanted = [line for line in lines if json.loads(line)["prompt_id"] in prompts["train"]]
    assert parts["train"].path.read_bytes().splitlines() == wanted, "byte for byte, in order"
    assert not list((tmp_path / "out").glob("*.part"))


def test_more_data_moves_no_prompt(tmp_path: Path):
    few = split_samples(write(tmp_path / "a.jsonl", rows(60)), tmp_path / "a", 0.3)
    many = split_samples(write(tmp_path / "b.jsonl", list(reversed(rows(90, samples=5)))), tmp_path / "b", 0.3)
    before, after = ({r["prompt_id"] for r in read(parts["validation"].path)} for parts in (few, many))
    assert before == {p for p in after if int(p[1:]) < 60}
    other = split_samples(tmp_path / "a.jsonl", tmp_path / "c", 0.3, seed=1)
    assert {r["prompt_id"] for r in read(other["validation"].path)} != before
    # the place itself is part of the contract: another version must not reshuffle anybody's data
    assert place(prompt_key({"prompt_token_ids": [1, 2, 3]}, ""), 0) == 0.9146281014923852


def test_messages_stand_in_for_ids():
    messages = [{"role": "user", "content": "hi"}]
    turned = [{"content": "hi", "role": "user"}]
    assert prompt_key({"messages": messages}, "") == prompt_key({"messages": turned, "id": 3}, "")
    assert prompt_key({"messages": messages}, "") != prompt_key({"messages": [{"role": "user", "content": "ho"}]}, "")
    with pytest.raises(SamplingError, match=r"line 3 must be an object with .* got id"):
        prompt_key({"id": 1}, "line 3")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "there is no file of samples"),
        ('{"prompt_token_ids": [1]}\n{nope\n', [], "line 2 is not JSON"),
        ("[1]\n", [], "line 1 must be an object with `prompt_token_ids` or `messages`, got list"),
        ('{"prompt_token_ids": [1]}\n', [], "part got none of the 1 different prompts"),
        ('{"prompt_token_ids": [1]}\n', ["--validation", "0.6", "--test", "0.4"], "leave something to train on"),
        ('{"prompt_token_ids": [1]}\n', ["--validation", "0"], "got 0 and 0"),
    ],
)
def test_errors_are_one_sentence_and_leave_nothing(tmp_path: Path, content: str | None, options: list, message: str):
    source = tmp_path / "s.jsonl"
    if content is not None:
        source.write_text(content)
    result = runner.invoke(main, ["split", str(source), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert not list((tmp_path / "out").glob("*"))


def test_files_that_are_there_are_kept(tmp_path: Path):
    source = write(tmp_path / "train.jsonl", rows(50))
    same = runner.invoke(main, ["split", str(source), "--out", str(tmp_path)])
    assert same.exit_code == 1 and "is one of the files to be written" in same.output
    out = tmp_path / "out"
    assert runner.invoke(main, ["split", str(source), "--out", str(out)]).exit_code == 0
    before = (out / "train.jsonl").read_bytes()
    again = runner.invoke(main, ["split", str(source), "--out", str(out), "--seed", "3"])
    assert again.exit_code == 1 and "already; choose another --out, or add --force" in again.output.replace("\n", " ")
    assert (out / "train.jsonl").read_bytes() == before
    forced = runner.invoke(main, ["split", str(source), "--out", str(out), "--seed", "3", "--force"])
    assert forced.exit_code == 0 and "validation" in forced.output
    assert (out / "train.jsonl").read_bytes() != before
