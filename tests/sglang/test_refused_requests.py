"""Every bad length field is HTTP 400 in the OpenAI error shape, and the server lives."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.sglang.conftest import Server

pytestmark = pytest.mark.slow

BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"length_target": 0}, "length_target"),
    ({"length_target": -3}, "length_target"),
    ({"length_target": 2.5}, "length_target"),
    ({"length_target": "10"}, "length_target"),
    ({"length_target": True}, "length_target"),
    ({"length_target": [10]}, "length_target"),
    ({"length_target": 2**40}, "length_target"),
    ({"length_target": 5000}, "length_target"),
    ({"length_target": 10, "length_mode": "about"}, "length_mode"),
    ({"length_target": 10, "length_mode": 3}, "length_mode"),
    ({"length_target": 10, "length_control": "magic"}, "length_control"),
    ({"length_target": 10, "length_sharpness": 0}, "length_sharpness"),
    ({"length_target": 10, "length_sharpness": "2"}, "length_sharpness"),
    ({"length_target": 10, "length_tolerance": 1.0}, "length_tolerance"),
    ({"length_target": 10, "length_tolerance": -0.1}, "length_tolerance"),
    ({"length_target": 10, "length_strict": "yes"}, "length_strict"),
    ({"length_bias": "shorter"}, "length_bias"),
    ({"length_bias": 1.0, "length_target": 10}, "length_bias"),
    ({"length_mode": "at_most"}, "length_mode"),
    ({"length_strict": True}, "length_strict"),
    ({"return_length_values": 1}, "return_length_values"),
    ({"length_goal": 10}, "length_goal"),
    ({"length_targt": 10}, "length_targt"),
    ({"length_target": 10, "ignore_eos": True}, "length_target"),
    ({"length_target": 10, "length_strict": True, "stop": ["x"]}, "length_strict"),
    ({"custom_params": {"length_target": 0}}, "length_target"),
    ({"custom_params": {"length_goal": 1}}, "length_goal"),
    ({"custom_params": {"lenvm_sample": 1}}, "lenvm_sample"),
    ({"length_target": 10, "custom_params": {"length_target": 11}}, "length_target"),
)
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20},
    "/v1/completions": {"model": "m", "prompt": "hello", "max_tokens": 20},
    "/generate": {"text": "hello", "sampling_params": {"max_new_tokens": 20}},
}


def assert_refused(response: Any, param: str) -> None:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == 400


def with_fields(route: str, fields: dict[str, Any], stream: bool) -> dict[str, Any]:
    body = {**ROUTES[route], "stream": stream}
    if route != "/generate":
        return {**body, **fields}
    # the host's own fields of /generate live among the sampling parameters
    own = {k: v for k, v in fields.items() if k in ("ignore_eos", "stop", "custom_params")}
    ours = {k: v for k, v in fields.items() if k not in own}
    return {**body, **ours, "sampling_params": {**body["sampling_params"], **own}}


@pytest.mark.parametrize(
    ("route", "body", "said"),
    [
        ("/generate", {"input_ids": [1, 400]}, "token id 400"),
        ("/generate", {"input_ids": [[1, 2], [-1]]}, "token id -1"),
        ("/v1/completions", {"model": "m", "prompt": [5, 10**9]}, "token id 1000000000"),
        ("/generate", {"text": ""}, "empty"),
        ("/generate", {"input_ids": []}, ""),
        ("/v1/completions", {"model": "m", "prompt": "hello", "stop_regex": "[a"}, "stop_regex"),
        ("/generate", {"text": "hello", "sampling_params": {"stop_regex": ["b", "(a"]}}, "stop_regex"),
        ("/v1/completions", {"model": "m", "prompt": ["hello", "you"], "n": 0}, "n must be a whole number"),
        ("/generate", {"text": "hello", "sampling_params": {"n": None}}, "n must be a whole number"),
        ("/generate", {"text": "hello", "sampling_params": []}, "sampling_params is a list of 0 for 1 prompt;"),
        ("/generate", {"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params is a list of 1 for 2 prompts;"),
    ],
)
def test_what_would_end_the_host(guided: Server, route: str, body: dict[str, Any], said: str) -> None:
    """The host itself looks token ids up unchecked, which ends it, and answers a bad expression or `n` with a 500."""
    response = guided.post(route, body)
    assert response.status_code == 400, response.text
    assert said in response.text
    assert guided.post("/generate", {"text": "hello", "sampling_params": {"max_new_tokens": 2}}).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_bad_fields(guided: Server, route: str) -> None:
    for fields, param in BAD:
        for stream in (False, True):
            assert_refused(guided.post(route, with_fields(route, fields, stream)), param)
    answer = guided.post(route, with_fields(route, {"length_target": 5}, stream=False))
    assert answer.status_code == 200, "the server must live"


def test_contradiction_with_max_tokens(guided: Server) -> None:
    for route, base in ROUTES.items():
        assert_refused(guided.post(route, {**base, "length_target": 21}), "length_target")
        assert guided.post(route, {**base, "length_target": 21, "length_mode": "at_most"}).status_code == 200


def test_generate_batches(guided: Server) -> None:
    params = {"max_new_tokens": 20}
    bad = {"text": ["a", "b"], "sampling_params": [params, {**params, "length_target": 0}]}
    assert_refused(guided.post("/generate", bad), "length_target")
    twice = {"text": "a", "sampling_params": {**params, "length_target": 4}, "length_target": 5}
    assert_refused(guided.post("/generate", twice), "length_target")


@pytest.mark.parametrize("field", ["session_id", "return_sampling_mask"])
def test_unsupported_companions(guided: Server, field: str) -> None:
    assert_refused(guided.post("/generate", {**ROUTES["/generate"], "length_target": 5, field: "x"}), "length_target")


def test_other_routes_refuse_rather_than_ignore(guided: Server) -> None:
    body = {"model": "m", "input": "hello", "length_target": 5}
    assert_refused(guided.post("/v1/responses", body), "length_target")


def test_broken_json_is_the_hosts_business(guided: Server) -> None:
    import httpx

    response = httpx.post(guided.url + "/v1/chat/completions", content=b'{"length_target": ', timeout=30)
    assert 400 <= response.status_code < 500


def test_server_without_lenvm(plain: Server) -> None:
    for route, base in ROUTES.items():
        for fields, param in (
            ({"length_target": 5}, "length_target"),
            ({"return_length_values": True}, "return_length_values"),
        ):
            assert_refused(plain.post(route, {**base, **fields}), param)
        assert plain.post(route, base).status_code == 200
        assert plain.post(route, {**base, "length_target": None}).status_code == 200
    custom = {"text": "a", "sampling_params": {"custom_params": {"length_target": 5}}}
    assert_refused(plain.post("/generate", custom), "length_target")


def test_the_openai_client_sees_a_bad_request(guided: Server) -> None:
    client = OpenAI(base_url=guided.url + "/v1", api_key="none")
    with pytest.raises(openai.BadRequestError, match="at_most") as caught:
        client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "hello"}],
            extra_body={"length_target": 5, "length_mode": "under"},
        )
    assert caught.value.param == "length_mode"
