"""From two commands to an answer of a given length, with the real parts."""

from __future__ import annotations

import json
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from lenvm.pipeline.server import SglangServer
from tests.e2e.conftest import TRAIN_PYTHON, Run, pipeline

pytestmark = pytest.mark.slow

MESSAGES: list[Any] = [{"role": "user", "content": "Describe the old garden."}]


def ask(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="default", messages=MESSAGES, max_tokens=150, seed=1, extra_body=fields)


def test_every_stage_ran_and_said_so(demo: Run) -> None:
    for stage in ("prepare", "train_base", "sample", "train_lenvm", "evaluate", "report"):
        assert re.search(rf"{stage}\b.*\d s", demo.printed), f"no line of {stage} in:\n{demo.printed}"
    for table in ("equal_to: targets within", "Length predicted at the prompt", "Speed at concurrency"):
        assert table in demo.printed, f"the report on the terminal lacks {table!r}"
    rows = [json.loads(line) for line in (demo.folder / "samples/train.jsonl").open()]
    assert len(rows) == 80 * 4
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert all(row["prompt_token_ids"] and row["completion_token_ids"] and row["model"] for row in rows)


def test_both_hosts_read_the_same_tokens(demo: Run) -> None:
    """The hosts have different versions of transformers; the ids the server sampled from are those of the training."""
    rows = [json.loads(line) for line in (demo.folder / "samples/train.jsonl").open()]
    script = (
        "import json, sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "write = lambda messages: t.apply_chat_template(messages, add_generation_prompt=True, return_dict=False); "
        "print(json.dumps([write(messages) for messages in json.load(sys.stdin)]))"
    )
    done = subprocess.run(
        [str(TRAIN_PYTHON), "-c", script, str(demo.base)],
        input=json.dumps([row["messages"] for row in rows]),
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [row["prompt_token_ids"] for row in rows]
    assert "cut into other tokens" not in (demo.folder / "logs/train_lenvm.log").read_text()


def test_the_checkpoint_is_a_length_value_model(demo: Run) -> None:
    config = json.loads((demo.lenvm / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForLengthValue"]
    assert config["lenvm"]["heads"] == ["value", "length"]
    assert 0 < config["lenvm"]["gamma"] < 1


def test_the_report_is_one_self_contained_page(demo: Run) -> None:
    page = (demo.folder / "report/index.html").read_text()
    assert "<svg" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?https?:", page)
    results = json.loads((demo.folder / "evaluation/results.json").read_text())
    assert results


def test_a_second_run_does_nothing_again(demo: Run) -> None:
    before = (demo.lenvm / "model.safetensors").stat().st_mtime_ns
    started = time.monotonic()
    done = pipeline(demo.folder)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 60
    assert (demo.lenvm / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("mode", ["equal_to", "at_most", "at_least"])
def test_chat_with_a_strict_target(client: OpenAI, mode: str) -> None:
    for target in (5, 23, 60):
        answer = ask(client, length_target=target, length_mode=mode, length_strict=True)
        used = answer.usage.completion_tokens
        assert {"equal_to": used == target, "at_most": used <= target, "at_least": used >= target}[mode], used
        assert answer.lenvm["target"] == target
        assert answer.lenvm["achieved"] == used
        assert answer.lenvm["mode"] == mode
        assert answer.lenvm["predicted_length"] > 0


def test_streaming(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="default",
            messages=MESSAGES,
            seed=1,
            max_tokens=150,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"length_target": 17, "length_strict": True, "return_length_values": True},
        )
    )
    usage = next(c.usage for c in chunks if c.usage)
    assert usage.completion_tokens == 17
    carried = [c.lenvm for c in chunks if getattr(c, "lenvm", None)]
    assert carried[-1]["achieved"] == 17
    assert len(carried[-1]["values"]) == 17
    assert carried[-1]["values"][-1] == 0


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(
        model="default",
        prompt="Describe the old garden.",
        seed=2,
        extra_body={"length_target": 31, "length_strict": True},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 31


def test_generate(server: SglangServer) -> None:
    body = {"text": "Describe", "length_target": 12, "length_strict": True, "sampling_params": {"temperature": 0}}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=120).json()
    assert answer["meta_info"]["completion_tokens"] == 12


def test_a_seed_repeats_an_answer(client: OpenAI) -> None:
    one, two = (ask(client, length_target=40).choices[0].message.content for _ in range(2))
    assert one == two


def test_bias_shortens_and_lengthens(client: OpenAI) -> None:
    """Means over the same seeds; the direction is what matters here."""

    def mean(**fields: Any) -> float:
        def used(seed: int) -> int:
            answer = client.chat.completions.create(
                model="default", messages=MESSAGES, max_tokens=150, seed=seed, extra_body=fields
            )
            assert answer.usage is not None
            return answer.usage.completion_tokens

        with ThreadPoolExecutor(12) as pool:
            return sum(pool.map(used, range(12))) / 12

    assert mean(length_bias=-40.0) < mean(length_bias=40.0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"length_target": 0}, "length_target must be a whole number of tokens, at least 1, got 0"),
        ({"length_taget": 9}, "did you mean 'length_target'"),
        ({"length_target": 9, "length_bias": 1}, "contradict"),
        ({"length_target": 400}, "cannot be reached with max_tokens 150"),
    ],
)
def test_bad_input_is_a_400_and_the_server_lives(client: OpenAI, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as error:
        ask(client, **fields)
    assert error.value.status_code == 400
    assert ask(client).usage.completion_tokens > 0
