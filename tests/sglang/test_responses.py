"""The OpenAI side of a real server: official client, streams, n > 1, logprobs, batches, endpoints of our own."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

from tests.sglang.conftest import Server
from tests.sglang.models import prompts
from tests.sglang.reference import Reference

pytestmark = pytest.mark.slow
MESSAGES: list[Any] = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def client(guided: Server) -> OpenAI:
    return OpenAI(base_url=guided.url + "/v1", api_key="none")


@pytest.mark.floor
def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="m", messages=MESSAGES, temperature=1, extra_body={"length_target": 13, "length_strict": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 13
    report = answer.model_extra["lenvm"]  # type: ignore[index]
    assert report["target"] == 13
    assert report["mode"] == "equal_to"
    assert report["achieved"] == 13
    assert report["predicted_length"] > 0
    assert answer.choices[0].model_extra["lenvm"] == report  # type: ignore[index]


@pytest.mark.floor
@pytest.mark.parametrize("usage", [False, True])
def test_chat_stream(client: OpenAI, usage: bool) -> None:
    stream = client.chat.completions.create(
        model="m",
        messages=MESSAGES,
        stream=True,
        **({"stream_options": {"include_usage": True}} if usage else {}),
        extra_body={"length_target": 9, "length_strict": True, "return_length_values": True},
    )
    chunks = list(stream)
    final = [c for c in chunks if c.choices and c.choices[0].finish_reason]
    assert len(final) == 1
    report = final[0].choices[0].model_extra["lenvm"]  # type: ignore[index]
    assert report["achieved"] == 9
    assert len(report["values"]) == 9
    assert report["values"][-1] == 0.0
    assert all("lenvm" not in (c.model_extra or {}) for c in chunks if c is not final[0])


def test_completions_default_max_tokens_leaves_room(client: OpenAI) -> None:
    answer = client.completions.create(
        model="m", prompt="hello", extra_body={"length_target": 30, "length_strict": True, "length_mode": "equal_to"}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 30, "the host's default of 16 must not cut a target of 30"
    assert answer.model_extra["lenvm"]["achieved"] == 30  # type: ignore[index]


def test_completions_stream_of_a_batch(client: OpenAI) -> None:
    stream = client.completions.create(
        model="m", prompt=["hello", "the fox"], stream=True, extra_body={"length_target": 6, "length_strict": True}
    )
    finished = {c.choices[0].index: c.choices[0] for c in stream if c.choices and c.choices[0].finish_reason}
    assert sorted(finished) == [0, 1]
    assert all(c.model_extra["lenvm"]["achieved"] == 6 for c in finished.values())  # type: ignore[index]


@pytest.mark.floor
def test_n_answers_differ_even_with_a_seed_and_repeat(client: OpenAI) -> None:
    def ask() -> list[str]:
        answer = client.chat.completions.create(
            model="m",
            messages=MESSAGES,
            n=3,
            seed=5,
            max_tokens=40,
            extra_body={"length_target": 10, "length_strict": True},
        )
        assert [c.model_extra["lenvm"]["achieved"] for c in answer.choices] == [10, 10, 10]  # type: ignore[index]
        return [c.message.content or "" for c in answer.choices]

    first = ask()
    assert len(set(first)) == 3
    assert ask() == first


@pytest.mark.floor
def test_requests_without_fields_are_left_alone(client: OpenAI, guided: Server) -> None:
    answer = client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=5)
    assert "lenvm" not in (answer.model_extra or {})
    body = guided.post("/v1/chat/completions", {"model": "m", "messages": MESSAGES, "max_tokens": 5}).json()
    assert "lenvm" not in body["choices"][0]


@pytest.mark.floor
def test_logprobs_are_the_base_models(guided: Server, reference: Reference) -> None:
    """Of guided rows too: log softmax of the base logits over the whole vocabulary, at the request's temperature."""
    (prompt,) = prompts(1, seed=20)
    for temperature in (0.0, 0.7):
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 8, "temperature": temperature},
            "length_target": 6,
            "length_strict": True,
            "return_logprob": True,
            "top_logprobs_num": 2,
        }
        answer = guided.post("/generate", body).json()
        ids = list(prompt)
        got = answer["meta_info"]["output_token_logprobs"]
        assert len(got) == 6
        for position, (log_p, token, _) in enumerate(got):
            expected = torch.log_softmax(reference.logits(ids) / (temperature or 1.0), -1)
            assert log_p == pytest.approx(float(expected[token]), abs=1e-3)
            top = answer["meta_info"]["output_top_logprobs"][position]
            assert [t[1] for t in top] == expected.topk(2).indices.tolist()
            ids.append(token)
    assert not math.isnan(log_p)


def test_generate_takes_fields_in_every_place(guided: Server) -> None:
    a, b, c = prompts(3, seed=21)
    params = {"max_new_tokens": 40, "temperature": 0}
    batch = guided.post(
        "/generate",
        {
            "input_ids": [a, b, c],
            "sampling_params": [
                {**params, "length_target": 5, "length_strict": True},
                {**params, "custom_params": {"length_target": 8, "length_strict": True}},
                params,
            ],
        },
    ).json()
    assert [x["meta_info"]["completion_tokens"] for x in batch[:2]] == [5, 8]
    assert [x.get("lenvm", {}).get("target") for x in batch] == [5, 8, None]
    top = guided.post(
        "/generate", {"input_ids": [a, b], "sampling_params": params, "length_target": 4, "length_strict": True}
    ).json()
    assert [x["lenvm"]["achieved"] for x in top] == [4, 4]


@pytest.mark.floor
def test_generate_stream_ends_with_the_report(guided: Server) -> None:
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 20}, "stream": True}
    fields = {"length_target": 6, "length_strict": True}
    with httpx.stream("POST", guided.url + "/generate", json={**body, **fields}, timeout=60) as response:
        events = [json.loads(x[6:]) for x in response.iter_lines() if x.startswith("data: {")]
    assert events[-1]["lenvm"]["achieved"] == 6
    assert all("lenvm" not in e for e in events[:-1])


@pytest.mark.floor
def test_info(guided: Server, plain: Server) -> None:
    info = httpx.get(guided.url + "/lenvm/info").json()
    assert info["architecture"] == "Qwen2ForLengthValue"
    assert info["gamma"] == 0.97
    assert info["max_candidates"] == 16
    assert httpx.get(plain.url + "/lenvm/info").status_code == 404


@pytest.mark.floor
def test_predict(guided: Server, reference: Reference) -> None:
    asked = prompts(3, seed=22)
    data = guided.post("/lenvm/predict", {"prompt": asked}).json()["data"]
    assert [d["predicted_length"] for d in data] == pytest.approx(
        [reference.expected_length(p) for p in asked], rel=1e-4
    )
    chat = guided.post("/lenvm/predict", {"messages": MESSAGES}).json()["data"]
    many = guided.post("/lenvm/predict", {"conversations": [MESSAGES, MESSAGES]}).json()["data"]
    assert [d["predicted_length"] for d in many] == pytest.approx([chat[0]["predicted_length"]] * 2)
    assert guided.post("/lenvm/predict", {"prompt": "hello"}).json()["data"][0]["prompt_tokens"] > 0


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "messages": MESSAGES},
        {"prompt": []},
        {"promt": "a"},
        {"prompt": [7] * 600},
        {"messages": [{"x": 1}]},
    ],
)
def test_predict_refuses(guided: Server, body: dict[str, Any]) -> None:
    response = guided.post("/lenvm/predict", body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]
