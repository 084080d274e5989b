"""The whole evaluation over real sockets with the real OpenAI client."""

from __future__ import annotations

import asyncio
import json

import pytest
from typer.testing import CliRunner

from lenvm.evaluation.client import Asker, ServerSettings
from lenvm.evaluation.commands import app
from lenvm.evaluation.data import read_natural
from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.plan import Request, natural_median
from lenvm.evaluation.schema import RESULTS_VERSION, read_results
from lenvm.evaluation.speed import measure_speed


def arguments(world, url, out, *more):
    return ["control", "--server", url, "--prompts", str(world.prompts), "--samples", str(world.samples),
            "--base", str(world.base), "--lenvm", str(world.lenvm), "--out", str(out), "--concurrency", "8",
            "--targets", "2", "--bound-targets", "1", "--median-samples", "2", "--share-samples", "2",
            "--curve-samples", "1", "--biases=-5,5", "--budgets", "0.8", *more]  # fmt: skip


def test_a_server_that_obeys_gets_full_marks_and_the_base_does_not(world, fake_server, tmp_path):
    out = tmp_path / "eval"
    done = CliRunner().invoke(app, arguments(world, fake_server.url, out))
    assert done.exit_code == 0, done.output
    results = read_results(out / "results.json")
    posterior, base = results.row("equal_to", "posterior"), results.row("equal_to", "base")
    assert posterior is not None
    assert base is not None
    assert posterior.length_score.value == 100.0
    assert posterior.kept.value == 100.0
    assert base.kept.value < 50
    assert posterior.length_score.n == base.length_score.n == 24
    assert posterior.log_prob_difference is not None
    assert base.log_prob_difference is None
    for mode in ("at_most", "at_least"):
        row = results.row(mode, "posterior_strict")
        assert row is not None
        assert row.kept.value == 100.0
    assert {r.controller for r in results.side} == {"base", "hard", "soft", "posterior_a1", "posterior", "posterior_a4"}
    assert all(r.length_score.n == 12 for r in results.side)
    assert [r.controller for r in results.median] == ["base", "hard", "posterior"]
    trade = results.trade_off
    assert trade is not None
    assert [p.setting for p in trade.biases] == [-5.0, 5.0]
    assert trade.biases[0].mean_length.value < trade.biases[1].mean_length.value
    assert all(p.overruns is not None and p.overruns.value == 0 for p in trade.budgets)
    assert results.prediction is not None
    assert len(results.prediction.points) == 12
    assert results.speed is not None
    assert results.speed.ratio == pytest.approx(results.speed.guided / results.speed.unguided)
    assert results.example is not None
    assert len(results.example.tokens) == len(results.example.remaining) == results.example.length
    assert "".join(results.example.tokens[:-1]) == results.example.text
    names = {c.name for c in results.criteria}
    assert "equal_to, Length Score" in names
    assert any("share of the base's accuracy" in name for name in names)
    assert not next(c for c in results.criteria if c.name == "held-out prompts").met
    for phrase in ("Length Score", "Thresholds", "coverage of p50", "guided / unguided", "cut at"):
        assert phrase in " ".join(done.output.split())
    sent = fake_server.seen[-1]
    assert (sent["temperature"], sent["top_p"]) == (1.0, 1.0)
    assert "top_k" not in sent
    assert sent["max_tokens"] == 64
    again = CliRunner().invoke(app, ["show", str(out)])
    assert again.exit_code == 0
    assert "Thresholds" in again.output


def test_requests_sample_as_the_samples_were_drawn(world, fake_server, tmp_path):
    drawn = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05}
    rows = [json.loads(line) for line in world.samples.read_text().splitlines()]
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps({**r, "sampling": {**r["sampling"], **drawn}}) + "\n" for r in rows))
    words = [
        str(samples) if w == str(world.samples) else w for w in arguments(world, fake_server.url, tmp_path / "out")
    ]
    done = CliRunner().invoke(app, [*words, "--no-speed"])
    assert done.exit_code == 0, done.output
    assert all({k: sent[k] for k in drawn} == drawn for sent in fake_server.seen)
    parameters = json.loads((tmp_path / "out" / "requests.jsonl").read_text().splitlines()[0])["parameters"]
    assert parameters["sampling"] == drawn


def test_a_part_of_the_evaluation(world, fake_server, tmp_path):
    words = arguments(
        world, fake_server.url, tmp_path, "--no-speed", "--modes", "equal_to", "--controllers", "posterior"
    )
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    results = read_results(tmp_path / "results.json")
    assert [(r.mode, r.controller) for r in results.control] == [("equal_to", "base"), ("equal_to", "posterior")]
    assert results.side == []
    assert results.trade_off is not None
    assert results.trade_off.budgets == []
    wrong = CliRunner().invoke(app, [*words, "--controllers", "fast"])
    assert wrong.exit_code == 2
    assert "unknown controller 'fast'" in " ".join(wrong.output.split())


def test_an_interrupted_run_asks_only_for_what_is_missing(world, fake_server, tmp_path):
    out = tmp_path / "eval"
    fake_server.refuse_after = 100
    stopped = CliRunner().invoke(app, arguments(world, fake_server.url, out, "--no-speed"))
    assert stopped.exit_code == 1
    assert "status 400" in stopped.output
    assert "no more answers" in stopped.output
    log = out / "requests.jsonl"
    kept = len(log.read_text().splitlines()) - 1
    assert 50 < kept <= 100
    with log.open("a") as file:
        file.write('{"key": "half a li')  # the process died in the middle of a line
    fake_server.refuse_after = None
    before = len(fake_server.seen)
    finished = CliRunner().invoke(app, arguments(world, fake_server.url, out, "--no-speed"))
    assert finished.exit_code == 0, finished.output
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    keys = [row["key"] for row in rows[1:]]
    assert len(set(keys)) == len(keys)
    assert len(fake_server.seen) - before == len(keys) - kept
    settled = len(fake_server.seen)
    CliRunner().invoke(app, arguments(world, fake_server.url, out, "--no-speed"))
    assert len(fake_server.seen) == settled


def test_other_parameters_need_another_directory(world, fake_server, tmp_path):
    out = tmp_path / "eval"
    assert CliRunner().invoke(app, arguments(world, fake_server.url, out, "--no-speed")).exit_code == 0
    other = CliRunner().invoke(app, arguments(world, fake_server.url, out, "--no-speed", "--seed", "7"))
    assert other.exit_code == 1
    assert "was begun with sizes" in " ".join(other.output.split())


def test_no_server(world, tmp_path):
    done = CliRunner().invoke(app, arguments(world, "http://127.0.0.1:9", tmp_path / "eval"))
    assert done.exit_code == 1
    assert "does not answer" in done.output


def test_a_refused_field_stops_with_the_servers_words(world, fake_server):
    prompt = read_natural(world.prompts, world.samples).prompts[0]

    async def ask() -> None:
        async with Asker(ServerSettings(fake_server.url + "/v1", max_tokens=64)) as asker:
            await asker.ask(Request("x", "y", prompt.id, None, 0, 1, {"length_traget": 5}), prompt.messages)

    with pytest.raises(EvaluationError, match="did you mean 'length_target'"):
        asyncio.run(ask())


def test_the_speed_measurement_counts_every_token(world, fake_server):
    """Answers arrive side by side; a guided one of the fake server has exactly its target's length."""
    prompts = read_natural(world.prompts, world.samples).prompts

    async def measure() -> list:
        async with Asker(ServerSettings(fake_server.url + "/v1", max_tokens=64, concurrency=8)) as asker:
            return await measure_speed(asker, prompts, rounds=1, requests=24)

    unguided, guided = asyncio.run(measure())
    assert guided.tokens == sum(natural_median(prompts[i % len(prompts)]) for i in range(24))
    assert unguided.tokens >= 24


def test_results_of_another_version_are_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"version": RESULTS_VERSION + 1}))
    with pytest.raises(EvaluationError, match="this program reads 1"):
        read_results(path)
    path.write_text(json.dumps({"version": RESULTS_VERSION}))
    with pytest.raises(EvaluationError, match="is not valid at created"):
        read_results(path)
