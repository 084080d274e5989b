"""Drawing completions from a server over real sockets: exact rows, retries, refusals, taking up, concurrency."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lenvm.sampling.errors import SamplingError
from lenvm.sampling.log import CompletionLog
from lenvm.sampling.prompts import Prompt, read_prompts, sample_seed
from lenvm.sampling.run import SamplingResult, sample
from lenvm.sampling.servers import OpenAIServer, SglangServer
from lenvm.sampling.settings import SamplingSettings
from lenvm.sampling.tokens import PromptTokenizer
from tests.sampling.conftest import STOP, Scripted


def settings(**changes: Any) -> SamplingSettings:
    return SamplingSettings(**{"n": 4, "max_tokens": 20, "concurrency": 8, "retries": 3, "seed": 7, **changes})


def draw(
    prompts: Path, out: Path, url: str, tokenizer: Path | None, api: str = "sglang", **changes: Any
) -> SamplingResult:
    kind = SglangServer if api == "sglang" else OpenAIServer
    s = settings(**changes)
    return sample(read_prompts(prompts), out, kind(url, s, tokenizer), s)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lenvm.sampling.transport.FIRST_PAUSE", 0.01)


def test_rows_are_complete_and_sorted(
    prompts_file: Path, tmp_path: Path, url: str, tokenizer_dir: Path, script: Scripted
):
    out = tmp_path / "out.jsonl"
    result = draw(prompts_file, out, url, tokenizer_dir)
    assert (result.drawn, result.kept, result.failed) == (48, 0, {})
    found = rows(out)
    assert [(r["prompt_id"], r["sample"]) for r in found] == [(f"p{i}", k) for i in range(12) for k in range(4)]
    tokenizer = PromptTokenizer(tokenizer_dir)
    for r in found:
        assert r["prompt_token_ids"] == tokenizer.prompt_ids(r["messages"])
        assert r["seed"] == sample_seed(7, r["prompt_id"], r["sample"])
        expected, why = script.completion(r["prompt_token_ids"], r["seed"], 20)
        assert (r["completion_token_ids"], r["finish_reason"]) == (expected, why)
        assert (r["completion_token_ids"][-1] == STOP) == (why == "stop")
        assert r["sampling"] == {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_tokens": 20}
        assert r["meta"]["kind"] == "test"
        assert (r["model"], r["token_ids"]) == ("tiny", "server")
    assert {r["finish_reason"] for r in found} == {"stop", "length"}
    assert script.most_in_flight <= 8
    assert script.asked["/generate"] == 12


def test_behind_a_router_a_request_carries_one_completion(
    prompts_file: Path, tmp_path: Path, url: str, tokenizer_dir: Path, script: Scripted
):
    script.dialect = "router"
    out = tmp_path / "out.jsonl"
    result = draw(prompts_file, out, url, tokenizer_dir)
    assert (result.drawn, result.failed) == (48, {})
    assert script.asked["/generate"] == 48
    assert any("router does not say" in note for note in result.notes)
    for r in rows(out):
        assert r["completion_token_ids"] == script.completion(r["prompt_token_ids"], r["seed"], 20)[0]
    assert json.loads((tmp_path / "out.jsonl.meta.json").read_text())["parameters"]["seeds_honoured"] is None


@pytest.mark.parametrize("dialect", ["sglang", "vllm"])
def test_openai_dialects_give_the_drawn_ids(
    dialect: str, prompts_file: Path, tmp_path: Path, url: str, script: Scripted
):
    script.dialect = dialect
    out = tmp_path / "out.jsonl"
    assert draw(prompts_file, out, f"{url}/v1", None, api="openai", n=2).drawn == 24
    for r in rows(out):
        expected, why = script.completion(r["messages"], r["seed"], 20)
        assert (r["prompt_token_ids"], r["completion_token_ids"], r["finish_reason"]) == ([5, 6, 7], expected, why)
        assert r["token_ids"] == "server"
    assert script.most_in_flight <= 8


@pytest.mark.parametrize("dialect", ["openai", "strict"])
def test_without_token_ids_texts_are_tokenised_again_and_marked(
    dialect: str, prompts_file: Path, tmp_path: Path, url: str, tokenizer_dir: Path, script: Scripted
):
    script.dialect = dialect
    with pytest.raises(SamplingError, match="returns no token ids; give --tokenizer"):
        draw(prompts_file, tmp_path / "none.jsonl", url, None, api="openai")
    out = tmp_path / "out.jsonl"
    result = draw(prompts_file, out, url, tokenizer_dir, api="openai", n=1)
    assert "tokenised again" in result.notes[0]
    for r in rows(out):
        assert r["token_ids"] == "retokenised"
        assert len(r["completion_token_ids"]) == len("hello world") + (r["finish_reason"] == "stop")
        assert r["counted_tokens"] >= 1
    assert json.loads((tmp_path / "out.jsonl.meta.json").read_text())["parameters"]["token_ids"] == "retokenised"


def test_retries_then_succeeds(prompts_file: Path, tmp_path: Path, url: str, tokenizer_dir: Path, script: Scripted):
    script.failures = [503, 429, 500, 502, 429]
    script.retry_after = "0"
    result = draw(prompts_file, tmp_path / "out.jsonl", url, tokenizer_dir, retries=5)
    assert (result.drawn, result.failed) == (48, {})
    assert script.asked["/generate"] == 12 + 5


def test_a_refused_prompt_is_reported_and_the_rest_is_kept(
    prompts_file: Path, tmp_path: Path, url: str, tokenizer_dir: Path, script: Scripted
):
    tokenizer = PromptTokenizer(tokenizer_dir)
    bad = read_prompts(prompts_file)[3]
    key = json.dumps(tokenizer.prompt_ids(bad.messages))
    script.refuse = {key: 400}
    out = tmp_path / "out.jsonl"
    result = draw(prompts_file, out, url, tokenizer_dir)
    assert list(result.failed) == ["p3"]
    assert "HTTP 400: scripted 400" in result.failed["p3"]
    assert result.drawn == 44
    script.refuse = {key: 500}
    again = draw(prompts_file, out, url, tokenizer_dir, retries=2)
    assert "HTTP 500: scripted 500 (after 3 attempts)" in again.failed["p3"]
    script.refuse = {}
    last = draw(prompts_file, out, url, tokenizer_dir)
    assert (last.drawn, last.kept, last.failed) == (4, 44, {})


def test_all_refused_gives_up_early(tmp_path: Path, url: str, tokenizer_dir: Path, script: Scripted):
    script.failures = [422] * 1000
    many = [Prompt(f"p{i}", [{"role": "user", "content": str(i)}]) for i in range(500)]
    with pytest.raises(SamplingError, match=r"first 20 prompts all failed.*scripted 422"):
        sample(many, tmp_path / "out.jsonl", SglangServer(url, settings(), tokenizer_dir), settings())
    assert script.asked["/generate"] < 60


def test_a_server_that_goes_away(prompts_file: Path, tmp_path: Path, tokenizer_dir: Path, url: str, script: Scripted):
    out = tmp_path / "out.jsonl"
    with pytest.raises(SamplingError, match="check --server"):
        draw(prompts_file, out, "http://127.0.0.1:9", tokenizer_dir)
    script.drop_after = 5
    result = draw(prompts_file, out, url, tokenizer_dir, retries=1)
    assert result.drawn == 20
    assert len(result.failed) == 7
    assert "(after 2 attempts)" in next(iter(result.failed.values()))
    script.drop_after = None
    assert draw(prompts_file, out, url, tokenizer_dir).drawn == 28


def test_interruption_changes_nothing(prompts_file: Path, tmp_path: Path, url: str, tokenizer_dir: Path):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    draw(prompts_file, whole, url, tokenizer_dir)
    lines = whole.read_bytes().splitlines(keepends=True)
    torn.write_bytes(b"".join(lines[::3]) + lines[1][:40])
    meta = json.loads((tmp_path / "whole.jsonl.meta.json").read_text())
    (tmp_path / "torn.jsonl.meta.json").write_text(json.dumps(meta))
    result = draw(prompts_file, torn, url, tokenizer_dir, concurrency=3)
    assert (result.kept, result.drawn, result.repaired) == (16, 32, 40)
    assert torn.read_bytes() == whole.read_bytes()


def test_other_parameters_are_refused(prompts_file: Path, tmp_path: Path, url: str, tokenizer_dir: Path):
    out = tmp_path / "out.jsonl"
    draw(prompts_file, out, url, tokenizer_dir)
    before = out.read_bytes()
    with pytest.raises(SamplingError, match=r"temperature: 1.0 then, 0.5 now.*remove it, or choose another --out"):
        draw(prompts_file, out, url, tokenizer_dir, temperature=0.5)
    with pytest.raises(SamplingError, match="prompts: "):
        sample(read_prompts(prompts_file)[:5], out, SglangServer(url, settings(), tokenizer_dir), settings())
    assert out.read_bytes() == before
    (tmp_path / "out.jsonl.meta.json").unlink()
    with pytest.raises(SamplingError, match="nobody knows how it was sampled"):
        draw(prompts_file, out, url, tokenizer_dir)


def test_a_broken_line_in_the_middle_is_an_error(prompts_file: Path, tmp_path: Path, url: str, tokenizer_dir: Path):
    out = tmp_path / "out.jsonl"
    draw(prompts_file, out, url, tokenizer_dir)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([*lines[:4], b"{broken\n", *lines[5:]]))
    with pytest.raises(SamplingError, match="line 5 is not a completion"):
        draw(prompts_file, out, url, tokenizer_dir)
    out.write_bytes(b"".join([*lines, lines[2]]))
    with pytest.raises(SamplingError, match="line 49 repeats sample 2 of prompt 'p0'"):
        draw(prompts_file, out, url, tokenizer_dir)


def test_two_writers_are_kept_apart(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    with (
        CompletionLog(out, {"n": 1}),
        pytest.raises(SamplingError, match="another process"),
        CompletionLog(out, {"n": 1}),
    ):
        pass
    with CompletionLog(out, {"n": 2}) as log:  # nothing drawn yet: new parameters are fine
        log.write({"prompt_id": "a", "sample": 0, "completion_token_ids": [1]})
    with pytest.raises(SamplingError, match="n: 2 then, 1 now"), CompletionLog(out, {"n": 1}):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ("{nope\n", "line 1 is not JSON"),
        ('{"id": 1}\n', "must be an object with `id` and `messages`, got id"),
        ('{"id": 1, "messages": []}\n', "not empty"),
        ('{"id": 1, "messages": [{"role": "user"}]}\n', "`role` and `content`"),
        ('{"id": 1, "messages": [{"role": "assistant", "content": "x"}]}\n', "last message is the assistant's"),
        ('{"id": 1, "messages": [{"role": "user", "content": "x"}]}\n' * 2, "line 2 repeats the id '1' of line 1"),
    ],
)
def test_bad_prompt_files(text: str, message: str, tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(SamplingError, match=message):
        read_prompts(path)


def test_missing_prompt_file(tmp_path: Path):
    with pytest.raises(SamplingError, match="there is no prompt file"):
        read_prompts(tmp_path / "none.jsonl")


def test_seeds_depend_on_each_part_and_on_nothing_else():
    seeds = {sample_seed(s, p, k) for s in range(3) for p in ("a", "b") for k in range(50)}
    assert len(seeds) == 300
    assert all(0 <= s < 2**31 for s in seeds)
    assert sample_seed(1, "a", 0) == sample_seed(1, "a", 0) == 105231704
