"""Endpoints of our own, metrics and the OpenAPI document, on a server with small chunks; API keys."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.sglang.conftest import API_KEY, Server
from tests.sglang.models import prompts
from tests.sglang.reference import Reference

pytestmark = pytest.mark.slow
MESSAGES: list[Any] = [{"role": "user", "content": "hello world"}]


def ask(server: Server, path: str, body: Any) -> httpx.Response:
    return server.post(path, body)


def values(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = ask(server, "/lenvm/values", body)
    assert response.status_code == 200, response.text
    return response.json()["data"]


def expected(reference: Reference, prompt: list[int], completion: list[int]) -> list[float]:
    """E[n] of every state, 0 after a stop token."""
    states = [prompt + completion[:t] for t in range(len(completion) + 1)]
    ended = [False, *(token == reference.stop for token in completion)]
    return [0.0 if end else reference.expected_length(s) for s, end in zip(states, ended, strict=True)]


def assert_states(found: dict[str, Any], reference: Reference, prompt: list[int], completion: list[int]) -> None:
    assert found["token_ids"] == completion
    assert (found["prompt_tokens"], found["completion_tokens"]) == (len(prompt), len(completion))
    assert found["remaining"] == pytest.approx(expected(reference, prompt, completion), rel=1e-4)
    z = reference.states([prompt + completion[:-1]])[0][0]
    assert found["values"][-2] == pytest.approx(-reference._u((z, [])), rel=1e-4)
    for name in ("p10", "p50", "p90"):
        assert len(found["quantiles"][name]) == len(completion) + 1
    assert all(a <= b <= c for a, b, c in zip(*found["quantiles"].values(), strict=True))


@pytest.mark.floor
def test_values_are_those_of_transformers(guided: Server, reference: Reference) -> None:
    """Prompts and completions longer than a chunk, alone and together; stop tokens in the middle and at the end."""
    asked = [(p, c) for p, c in zip(prompts(6, seed=40, shared=30), prompts(6, seed=41), strict=True)]
    asked[0] = (asked[0][0], [*asked[0][1], reference.stop])
    asked[1] = ([*asked[1][0], reference.stop], [5, reference.stop, 6, 7])
    asked[2] = ([9], [8])
    items = [{"prompt": p, "completion": c} for p, c in asked]
    for found, (prompt, completion) in zip(values(guided, {"items": items}), asked, strict=True):
        assert_states(found, reference, prompt, completion)
    assert_states(values(guided, items[3])[0], reference, *asked[3])


@pytest.mark.floor
def test_values_after_the_prefix_was_cached(guided: Server, reference: Reference) -> None:
    (prompt,), (completion,) = prompts(1, seed=42), prompts(1, seed=43)
    for _ in range(2):
        assert_states(values(guided, {"prompt": prompt, "completion": completion})[0], reference, prompt, completion)
    # what was read for its values serves guided requests too, and the other way round
    answer = served_greedy(guided, prompt + completion, {"length_target": 9})
    assert answer["output_ids"] == reference.greedy(prompt + completion, 12, {"length_target": 9})
    longer = completion + answer["output_ids"]
    assert_states(values(guided, {"prompt": prompt, "completion": longer})[0], reference, prompt, longer)


def served_greedy(server: Server, ids: list[int], fields: dict[str, Any]) -> dict[str, Any]:
    params = {"max_new_tokens": 12, "temperature": 0}
    return ask(server, "/generate", {"input_ids": ids, "sampling_params": params, **fields}).json()


def test_values_agree_with_what_generation_reported(guided: Server) -> None:
    fields = {"return_length_values": True, "length_target": 8, "length_strict": True}
    (prompt,) = prompts(1, seed=44)
    answer = served_greedy(guided, prompt, fields)
    found = values(guided, {"prompt": prompt, "completion": answer["output_ids"]})[0]
    report = answer["lenvm"]
    assert found["remaining"] == pytest.approx([report["predicted_length"], *report["values"]], rel=1e-4)
    assert {k: v[0] for k, v in found["quantiles"].items()} == report["quantiles"]


def test_values_and_predictions_of_conversations_and_texts(guided: Server) -> None:
    chat = values(guided, {"messages": MESSAGES, "completion": "yes no"})[0]
    again = values(guided, {"messages": MESSAGES, "completion": chat["token_ids"]})[0]
    assert again["remaining"] == pytest.approx(chat["remaining"], rel=1e-5)
    rendered = "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    assert values(guided, {"prompt": rendered, "completion": "yes no"})[0]["remaining"] == pytest.approx(
        chat["remaining"], rel=1e-5
    )
    for body in ({"messages": MESSAGES}, {"prompt": rendered}):
        predicted = ask(guided, "/lenvm/predict", body).json()["data"][0]
        assert predicted["predicted_length"] == pytest.approx(chat["remaining"][0], rel=1e-5)
        assert predicted["prompt_tokens"] == chat["prompt_tokens"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "exactly one of prompt, messages"),
        ({"prompt": "a"}, "completion is missing"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "messages": MESSAGES, "completion": "b"}, "exactly one"),
        ({"items": []}, "items is empty"),
        ({"items": [{"prompt": "a"}]}, "items.0: completion is missing"),
        ({"items": [{"prompt": "a", "completion": "b"}], "prompt": "a"}, "beside items"),
        ({"prompt": "a", "completion": 3}, "completion: must be a text or token ids"),
        ({"prompt": "a", "completion": [True]}, "completion: must be a text or token ids"),
        ({"prompt": "a", "completion": [320]}, "token ids are from 0 to 319"),
        ({"prompt": [10**30], "completion": "b"}, "prompt"),
        ({"prompt": "a", "completion": [7] * 600}, "context of 512"),
        ({"prompt": "a", "completion": "b", "top_p": 1}, "top_p"),
        ({"messages": [{"x": 1}], "completion": "b"}, "messages"),
        ([], "body"),
    ],
)
def test_values_refuses(guided: Server, body: Any, says: str) -> None:
    response = ask(guided, "/lenvm/values", body)
    assert response.status_code == 400, response.text
    assert says in response.json()["error"]["message"]


def test_broken_json_is_a_400(guided: Server) -> None:
    for raw in (b"", b"{", b'{"prompt": "\\ud800", "completion": "a"}', b"[" * 100_000, b"\xff"):
        for path in ("/lenvm/values", "/lenvm/predict"):
            response = httpx.post(guided.url + path, content=raw, timeout=60)
            assert response.status_code == 400, raw[:20]
            assert response.json()["error"]["message"]


def test_the_servers_api_key_guards_every_endpoint(stressed: Server) -> None:
    for method, path in (
        ("GET", "/lenvm/info"),
        ("POST", "/lenvm/predict"),
        ("POST", "/lenvm/values"),
        ("GET", "/lenvm"),
    ):
        assert httpx.request(method, stressed.url + path).status_code == 401, path
        assert httpx.request(method, stressed.url + path, headers=stressed.headers).status_code != 401, path
    client = OpenAI(base_url=stressed.url + "/v1", api_key=API_KEY)
    assert client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=2).choices


def test_the_sequence_key_is_ours(guided: Server) -> None:
    params = {"custom_params": {"lenvm_sequence_from": 0, "return_length_values": True}}
    response = ask(guided, "/generate", {"text": "a", "sampling_params": params})
    assert response.status_code == 400


@pytest.mark.floor
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/generate"])
def test_streams_carry_values_as_they_come(guided: Server, route: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"model": "m", "messages": MESSAGES, "max_tokens": 120},
        "/v1/completions": {"model": "m", "prompt": "hello", "max_tokens": 120},
        "/generate": {"text": "hello", "sampling_params": {"max_new_tokens": 120}},
    }
    # long enough that the front end, which puts together what it finds waiting, cannot be late for all of it
    fields = {"length_target": 90, "length_strict": True, "return_length_values": True, "stream": True}
    with httpx.stream("POST", guided.url + route, json={**bodies[route], **fields}, timeout=60) as response:
        events = [json.loads(x[6:]) for x in response.iter_lines() if x.startswith("data: {")]
    choices = events if route == "/generate" else [c for e in events for c in e["choices"]]
    deltas = [c["lenvm_delta"] for c in choices if "lenvm_delta" in c]
    assert len(deltas) > 3, "values come with their tokens, not all at the end"
    report = choices[-1]["lenvm"]
    assert [v for d in deltas for v in d["values"]] == report["values"]
    assert len(report["values"]) == 90
    assert {d["predicted_length"] for d in deltas} == {report["predicted_length"]}


def samples(server: Server) -> dict[str, float]:
    """Samples of `/metrics` by name and labels."""
    lines = httpx.get(server.url + "/metrics/", follow_redirects=True).text.splitlines()
    return {x.rsplit(" ", 1)[0]: float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith("lenvm_")}


@pytest.mark.floor
def test_metrics_count_guided_requests_and_no_others(guided: Server) -> None:
    before = samples(guided)
    served_greedy(guided, [5, 6, 7], {})
    assert {k: v for k, v in samples(guided).items() if "seconds" not in k} == {
        k: v for k, v in before.items() if "seconds" not in k
    }
    for target in (6, 9):
        served_greedy(guided, [5, 6, 7], {"length_target": target, "length_control": "hard", "length_strict": True})
    served_greedy(guided, [5, 6, 7], {"length_bias": 2.0})
    after = samples(guided)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('lenvm_requests_total{control="hard",finish="stop",mode="equal_to"}') == 2
    assert grown('lenvm_tokens_total{control="hard",mode="equal_to"}') == 15
    assert grown('lenvm_target_error_tokens_count{mode="equal_to"}') == 2
    assert grown('lenvm_target_error_tokens_sum{mode="equal_to"}') == 0
    assert sum(grown(k) for k in after if k.startswith("lenvm_requests_total") and 'control="bias"' in k) == 1
    assert grown("lenvm_steered_rows_total") >= 15
    assert {k for k in after if k.startswith("lenvm_fallback_rows_total")} == {
        f'lenvm_fallback_rows_total{{reason="{reason}"}}' for reason in ("not_finite", "no_weight")
    }
    for phase in ("read", "choose"):
        assert grown(f'lenvm_step_seconds_count{{phase="{phase}"}}') > 0
        assert grown(f'lenvm_step_seconds_sum{{phase="{phase}"}}') > 0


@pytest.mark.floor
def test_openapi_speaks_of_length_control(guided: Server) -> None:
    document = httpx.get(guided.url + "/openapi.json", timeout=60).json()
    schemas = document["components"]["schemas"]
    for path in ("/v1/chat/completions", "/v1/completions", "/generate"):
        operation = document["paths"][path]["post"]
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
        own = {k: v for k, v in schemas[name]["properties"].items() if k.startswith("length_") or "length_values" in k}
        assert len(own) == 9
        assert all(field["description"] for field in own.values())
        answer = json.dumps(operation["responses"]["200"])
        assert "#/components/schemas/LengthReport" in answer
    for path in ("/lenvm/predict", "/lenvm/values"):
        assert "$ref" in json.dumps(document["paths"][path]["post"]["requestBody"])
    assert "/lenvm/info" in document["paths"]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= set(schemas), references - set(schemas)


def test_the_page_is_one_file_without_outside_parts(guided: Server) -> None:
    response = httpx.get(guided.url + "/lenvm")
    assert response.headers["content-type"].startswith("text/html")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", response.text)
