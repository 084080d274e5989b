"""LIFEBench: both scorers against hand-computed values, the prompts, and the whole run over real sockets."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from typer.testing import CliRunner

from lenvm.cli import main
from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.judge import rating
from lenvm.evaluation.lifebench import LifebenchSizes, make_plan
from lenvm.evaluation.lifebench_items import Item, read_items, word_count
from lenvm.evaluation.metrics import cut_sentence, length_score, released_score
from lenvm.evaluation.outcome import read_outcome
from lenvm.evaluation.schema import Estimate
from tests.eval.conftest import STOP, served


def test_both_scorers_by_hand():
    lengths, target = [98, 100, 102], 100  # two per cent too short, exact, two per cent too long
    assert length_score(lengths, target) == pytest.approx([100 * math.exp(-0.1), 100, 100 * math.exp(-0.04)])
    assert released_score(lengths, target) == pytest.approx([100 * math.exp(-10), 100, 100 * math.exp(-4)])
    assert released_score(lengths, target, "at_most") == pytest.approx([100, 100, 100 * math.exp(-4)])
    assert released_score(lengths, target, "at_least") == pytest.approx([100 * math.exp(-10), 100, 100])
    assert np.isfinite(released_score([1, 10_000], [10_000, 1])).all()
    with pytest.raises(ValueError, match="unknown length mode"):
        released_score(1, 1, "about")


@pytest.mark.parametrize(
    ("text", "cut"),
    [("It ends.", False), ("“It ends.”", False), ("**It ends!**\n", False), ("结束了。", False), ("It", True),
     ("So, then,", True), ("", True), ("Answer: 16", True), ("(Really?)", False)],
)  # fmt: skip
def test_cut_sentence(text: str, cut: bool):
    assert cut_sentence(text) is cut


def test_the_constraint_is_in_tokens_in_both_languages():
    english = Item("1", "qa", "en", "Say. [Requirement] Your answer must be {word_count_type} {word_count} words long.")
    assert english.prompt("equal_to", 64).endswith("Your answer must be equal to 64 tokens long.")
    assert english.prompt("at_least", 32).endswith("must be at least 32 tokens long.")
    chinese = Item("2", "qa", "cn", "[要求]你的回答字数必须{word_count_type} {word_count}字。")
    assert chinese.prompt("at_most", 128) == "[要求]你的回答token数必须至多有 128个token。"


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "lifebench.jsonl"
    rows = [
        {"id": i, "category": ("qa", "create", "reasoning")[i % 3], "lang": "en" if i % 2 else "cn", "type": "x",
         "task": f"w{i} w1 must be {{word_count_type}} {{word_count}} " + ("words long." if i % 2 else "字。")}
        for i in range(6)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_limit_keeps_every_category(items):
    assert [i.id for i in read_items(items, 3)] == ["0", "2", "4"]
    assert len(read_items(items)) == 6


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"id": 1}', "line 7 lacks category, lang, task"), ("{", "line 7 is not JSON"),
     ('{"id": 1, "category": "qa", "lang": "de", "task": "x"}', "`lang` is 'de'"),
     ('{"id": 9, "category": "qa", "lang": "en", "task": "x"}', "has no {word_count_type}"),
     ('{"id": 1, "category": "qa", "lang": "en", "task": "{word_count_type} {word_count}"}', "repeats the id 1")],
)  # fmt: skip
def test_bad_data_is_named_with_its_line(items, line: str, message: str):
    items.write_text(items.read_text() + line + "\n")
    with pytest.raises(EvaluationError, match=message):
        read_items(items)


def test_cutting_is_not_asked_where_it_cannot_work(items):
    plan = make_plan(read_items(items), LifebenchSizes(targets=(8,)))
    assert len({r.key for r in plan}) == len(plan)
    asked = {(r.experiment, r.controller) for r in plan}
    assert ("at_least", "cut") not in asked
    assert ("equal_to", "cut") in asked
    posteriors = {"posterior_a1", "posterior_a2", "posterior_a4", "posterior_strict"}
    assert {k for _, k in asked} == {"base", "cut", "boost", "countdown", "hard", *posteriors}
    cut = next(r for r in plan if r.controller == "cut")
    assert cut.fields == {"max_tokens": 8}


def test_an_oracle_scores_100_and_the_page_and_tables_say_so(world, fake_server, items, tmp_path):
    out = tmp_path / "out"
    words = ["eval", "lifebench", "--server", fake_server.url, "--data", str(items), "--base", str(world.base),
             "--out", str(out), "--targets", "12,30", "--max-tokens", "64"]  # fmt: skip
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    outcome = read_outcome(out / "results.json")
    table = {str(row[0]): row for row in outcome.sheet("Table 2").rows}
    for label in ("posterior, sharpness 1", "posterior, sharpness 4", "posterior, strict", "paper's hard rule"):
        scores = table[label][2:]
        assert all(isinstance(s, Estimate) and s.value == 100.0 and s.n == 12 for s in scores)
    base, cut = table["base model"][2], table["cut by max_tokens"]
    assert isinstance(base, Estimate)
    assert base.value < 60
    assert cut[4] is None
    assert isinstance(cut[3], Estimate)
    assert cut[3].value == 100.0
    quality = {(str(r[0]), str(r[1])): r for r in outcome.sheet("Quality").rows}
    stops = quality["equal_to", "cut by max_tokens"][2]
    assert isinstance(stops, Estimate)
    assert stops.value < 100
    assert outcome.sheet("Length Score by target").head[2:] == ["12 tokens", "30 tokens"]
    assert outcome.sheet("Length Score by category").head[2:] == ["qa", "create", "reasoning"]
    assert "no summaries" in outcome.summary[0]
    prompt = next(b for b in fake_server.seen if b.get("length_mode") == "at_most")["messages"][0]["content"]
    assert "at most 12 tokens" in prompt or "至多有" in prompt
    assert (fake_server.seen[0]["top_k"], fake_server.seen[0]["top_p"]) == (15, 0.999)
    asked = len(fake_server.seen)
    assert "| base model |" in (out / "tables.md").read_text()
    assert CliRunner().invoke(main, words).exit_code == 0
    assert len(fake_server.seen) == asked
    assert "Table 2" in CliRunner().invoke(main, ["eval", "show", str(out)]).output
    page = tmp_path / "page.html"
    assert CliRunner().invoke(main, ["report", str(out), "--out", str(page)]).exit_code == 0
    assert page.read_text().count("<svg") == 3
    assert "http" not in page.read_text().replace("http://www.w3.org", "").replace(fake_server.url, "")


def test_items_that_do_not_fit_are_left_out_and_counted(world, fake_server, items, tmp_path):
    long = {"id": 99, "category": "qa", "lang": "en", "task": "w1 " * 50 + "{word_count_type} {word_count} words"}
    items.write_text(items.read_text() + json.dumps(long) + "\n")
    words = ["eval", "lifebench", "--server", fake_server.url, "--data", str(items), "--base", str(world.base),
             "--targets", "12", "--modes", "equal_to", "--controllers", "hard"]  # fmt: skip
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "o"), "--max-prompt-tokens", "40"])
    assert done.exit_code == 0, done.output
    outcome = read_outcome(tmp_path / "o" / "results.json")
    assert outcome.summary[-1] == "1 items were left out: their prompts have more than 40 tokens."
    assert "99" not in outcome.parameters["items"]
    none = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "p"), "--max-prompt-tokens", "1"])
    assert "0 of 7 prompts have at most 1 tokens" in " ".join(none.output.split())


def test_what_the_controllers_without_a_lenvm_ask(world, fake_server, items, tmp_path):
    words = ["eval", "lifebench", "--server", fake_server.url, "--data", str(items), "--base", str(world.base),
             "--targets", "12", "--controllers", "boost,countdown", "--boost", "4",
             "--out", str(tmp_path / "o")]  # fmt: skip
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    bias = [body["logit_bias"][str(STOP)] for body in fake_server.seen if "logit_bias" in body]
    assert sorted(bias) == [-4.0] * 6 + [4.0] * 12
    asked = [body["messages"][0]["content"] for body in fake_server.seen]
    assert sum("Keep count while you write" in text for text in asked) == 9
    assert sum("写作时请倒数" in text for text in asked) == 9


def test_words_are_counted_and_targets_become_tokens(world, fake_server, items, tmp_path):
    assert word_count("It is 16,  or so.", "en") == 5
    assert word_count("他买了 3 个apple。", "cn") == 6
    words = ["eval", "lifebench", "--server", fake_server.url, "--data", str(items), "--base", str(world.base),
             "--unit", "words", "--targets", "12", "--modes", "equal_to", "--controllers", "posterior",
             "--out", str(tmp_path / "o")]  # fmt: skip
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    text = next(body["messages"][0]["content"] for body in fake_server.seen)
    assert "token" not in text
    outcome = read_outcome(tmp_path / "o" / "results.json")
    ratio = outcome.parameters["tokens_a_word"]
    asked = {lang: max(1, round(12 * tokens)) for lang, tokens in ratio.items()}
    assert 1 < asked["en"] < 12, "this tokenizer drops the words that it does not know"
    guided = {body["length_target"] for body in fake_server.seen if "length_target" in body}
    assert guided == set(asked.values())
    assert outcome.sheet("Length Score by target").head[2:] == ["12 words"]
    assert "words (in Chinese, characters)" in outcome.summary[1]
    row = next(r for r in outcome.sheet("Length Score by language").rows if r[1] == "posterior, sharpness 1")
    english = row[outcome.sheet("Length Score by language").head.index("en")]
    rows = [json.loads(line) for line in (tmp_path / "o" / "requests.jsonl").read_text().splitlines()[1:]]
    texts = [r["text"] for r in rows if r["controller"] == "posterior_a1" and int(r["prompt_id"]) % 2]
    scores = [float(length_score(len(text.split()), 12)) for text in texts]
    assert isinstance(english, Estimate) and english.value == pytest.approx(sum(scores) / 3)


def test_a_judge_rates_every_answer_once(world, fake_server, items, tmp_path):
    seen: list[dict[str, Any]] = []
    judge = FastAPI()

    @judge.post("/v1/chat/completions")
    async def rate(http: Request) -> Any:
        seen.append(await http.json())
        if len(seen) == 5:
            return JSONResponse({"error": {"message": "too much", "code": 422}}, 422)
        content = "no idea" if len(seen) == 1 else "Rating: 8/10"
        message = {"role": "assistant", "content": content}
        return {"id": "x", "object": "chat.completion", "created": 0, "model": "big",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}  # fmt: skip

    words = ["eval", "lifebench", "--server", fake_server.url, "--data", str(items), "--base", str(world.base),
             "--targets", "12", "--modes", "equal_to", "--controllers", "hard", "--concurrency", "1",
             "--out", str(tmp_path / "o")]  # fmt: skip
    with served(judge) as url:
        alone = CliRunner().invoke(main, [*words, "--judge", url])
        assert alone.exit_code == 2
        assert "go together" in " ".join(alone.output.split())
        words += ["--judge", url, "--judge-model", "big"]
        stopped = CliRunner().invoke(main, words)
        assert stopped.exit_code == 1
        assert "the judge at" in " ".join(stopped.output.split())
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
    assert len(seen) == 13, "12 answers, one of them asked again"
    assert len(fake_server.seen) == 12
    assert "[Answer]" in seen[0]["messages"][0]["content"]
    rows = {row[1]: row for row in read_outcome(tmp_path / "o" / "results.json").sheet("Rated").rows}
    mean = rows["paper's hard rule"][2]
    assert isinstance(mean, Estimate) and mean.value == 8.0 and mean.n == 6
    assert rows["base model"][3] == 1, "one reply without a number"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("7", 7), ("10", 10), ("Rating: 8/10", 8), ("0", None), ("7.5", None), ("11", None), ("", None), ("9.", 9)],
)
def test_ratings_are_whole_numbers(reply: str, expected: int | None):
    assert rating(reply) == expected


def test_options_that_cannot_be(world, fake_server, items, tmp_path):
    words = ["eval", "lifebench", "--server", fake_server.url, "--data", str(items), "--base", str(world.base),
             "--out", str(tmp_path / "o")]  # fmt: skip
    small = CliRunner().invoke(main, [*words, "--targets", "64", "--max-tokens", "64"])
    assert small.exit_code == 1
    assert "the largest target is 64 tokens" in " ".join(small.output.split())
    unknown = CliRunner().invoke(main, [*words, "--controllers", "fast"])
    assert unknown.exit_code == 2
    assert "unknown controller 'fast'" in " ".join(unknown.output.split())
