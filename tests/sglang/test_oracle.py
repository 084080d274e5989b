"""A perfect value model, and a value model that breaks: one server over the chain of `tests.sglang.oracle`."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from tests.sglang import faults
from tests.sglang.conftest import Server, start
from tests.sglang.oracle import LONGEST, make_oracle_pair, remaining, token

pytestmark = pytest.mark.slow
PROMPT = [200, 201, 202]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("oracle")
    pair = make_oracle_pair(home / "pair")
    flags = ("--lenvm-model", str(pair / "lenvm"), "--enable-metrics")
    server = start(home / "log", pair / "base", *flags, plugins=("faults", "forked"))
    try:
        yield server.wait()
    finally:
        server.stop()


def ask(server: Server, fields: dict[str, Any] | None, prompt: list[int] = PROMPT, **sampling: Any) -> httpx.Response:
    params = {"max_new_tokens": 100, "temperature": 1.0, **sampling}
    return server.post("/generate", {"input_ids": prompt, "sampling_params": params, **(fields or {})})


def tokens(server: Server, fields: dict[str, Any] | None, prompt: list[int] = PROMPT, **sampling: Any) -> list[int]:
    answer = ask(server, fields, prompt, **sampling)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["output_ids"])


def metric(server: Server, name: str) -> float:
    text = httpx.get(server.url + "/metrics", timeout=30).text
    return sum(float(x) for x in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.M))


def test_the_table_is_that_of_the_chain() -> None:
    q = remaining()
    assert torch.allclose(q[1:].sum(-1), torch.ones(LONGEST, dtype=torch.float64))
    assert q[1, 1] == pytest.approx(0.75)  # 0.55 by one step, 0.2 because three steps go no further than the end
    assert q[5, 1] == 0


def test_a_perfect_value_model_gives_exactly_the_target(oracle: Server) -> None:
    """No off-by-one anywhere: 300 sampled answers, none of them strict, T = 1, 2, 3 included."""
    targets = [1 + i % 40 for i in range(280)] + [1, 2, 3, 4] * 5
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda t: tokens(oracle, {"length_target": t}), targets))
    assert [len(a) for a in answers] == targets
    assert len({tuple(a) for a in answers}) > 200, "sampled, not one answer a target"


def test_bounds_of_a_perfect_value_model(oracle: Server) -> None:
    asked = [(t, mode) for t in (1, 2, 3, 9, 25) for mode in ("at_most", "at_least") for _ in range(4)]
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda a: tokens(oracle, {"length_target": a[0], "length_mode": a[1]}), asked))
    for (target, mode), answer in zip(asked, answers, strict=True):
        assert len(answer) <= target if mode == "at_most" else len(answer) >= target, (mode, target)


def test_a_request_alone_is_the_same_in_a_full_batch(oracle: Server) -> None:
    asked = [
        ({"length_target": 7}, 1), ({"length_target": 12, "length_mode": "at_most"}, 2), (None, 0),
        ({"length_bias": -4.0}, 4), ({"length_target": 9, "length_control": "soft"}, 5),
        ({"length_target": 15, "length_control": "hard"}, 6), ({"length_target": 30, "length_strict": True}, 7),
    ]  # fmt: skip

    def one(case: Any) -> list[int]:
        if case[0] is None:
            return tokens(oracle, None, [200, token(20)], temperature=0)
        return tokens(oracle, case[0], sampling_seed=case[1])

    alone = [one(case) for case in asked]
    with ThreadPoolExecutor(28) as pool:
        assert list(pool.map(one, asked * 4)) == alone * 4


# ----- faults -------------------------------------------------------------------------------------------------------


def test_nan_and_infinity_fall_back_to_the_base(oracle: Server) -> None:
    before = metric(oracle, "lenvm_fallback_rows_total")
    for bad in (faults.NAN, faults.INFINITE):
        answer = ask(oracle, {"length_target": 9, "return_length_values": True}, [200, bad]).json()
        assert answer["lenvm"]["predicted_length"] is None
        # a broken candidate: the whole row keeps the base model's distribution
        answer = ask(oracle, {"length_target": 9, "length_strict": True}, logit_bias={str(bad): 40.0}).json()
        assert answer["lenvm"]["achieved"] == 9, "strict holds whatever the value model says"
        predicted = oracle.post("/lenvm/predict", {"prompt": [200, bad]})
        assert predicted.status_code == 500
        assert "NaN or infinity" in predicted.json()["error"]["message"]
    assert metric(oracle, "lenvm_fallback_rows_total") > before


def test_a_forward_that_raises_ends_its_request_alone(oracle: Server) -> None:
    before = metric(oracle, "lenvm_failed_requests_total")
    good = [({"length_target": t}, PROMPT, {}) for t in (5, 17, 30)] + [(None, [200, token(20)], {"temperature": 0})]
    bad = [
        ({"length_target": 9}, [200, faults.RAISE_IN_PREFILL], {}),
        ({"length_target": 9}, PROMPT, {"logit_bias": {str(faults.RAISE_IN_DECODE): 40.0}}),
        ({"return_length_values": True}, PROMPT, {"logit_bias": {str(faults.RAISE_IN_DECODE): 100.0}}),
    ]
    plain = tokens(oracle, None, [200, token(20)], temperature=0)
    with ThreadPoolExecutor(28) as pool:
        found = list(pool.map(lambda c: ask(oracle, c[0], c[1], **c[2]), (good + bad) * 4))
    for i, answer in enumerate(found):
        kind = i % len(good + bad)
        if kind >= len(good):
            assert answer.status_code == 500, answer.text
            assert "the length value model failed on this request" in answer.text
        elif kind == len(good) - 1:
            assert answer.json()["output_ids"] == plain
        else:
            assert len(answer.json()["output_ids"]) == good[kind][0]["length_target"]
    assert metric(oracle, "lenvm_failed_requests_total") == before + 4 * len(bad)
    # what they left in the cache is not reused: the same prompt without the fault is right
    assert len(tokens(oracle, {"length_target": 6})) == 6
    assert oracle.post("/lenvm/predict", {"prompt": [200, faults.RAISE_IN_PREFILL]}).status_code == 500


# ----- bodies and clients -------------------------------------------------------------------------------------------


def raw(server: Server, content: bytes, path: str = "/generate") -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.post(server.url + path, content=content, headers=headers, timeout=120)


def test_malformed_and_monstrous_bodies(oracle: Server) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    bodies = {
        b"": 400, b"{": 400, b"[]": 400, b"null": 400, b"\xff\xfe{": 400, b'{"length_target": 5': 400,
        b'{"text": "a", "length_target": ' + deep + b"}": 400,
        b'{"text": "a", "length_target": 1' + b"0" * 5000 + b"}": 400,
        b'{"text": "a", "length_target": "' + b"x" * 10_000_000 + b'"}': 400,
        b'{"text": "' + b"hello " * 300_000 + b'", "length_target": 5}': 400,
    }  # fmt: skip
    for body, status in bodies.items():
        answer = raw(oracle, body)
        assert answer.status_code in (status, 422), (body[:60], answer.status_code, answer.text[:200])
        assert len(answer.content) < 2_000
    for path in ("/lenvm/predict", "/lenvm/values"):
        for body in bodies:
            assert raw(oracle, body, path).status_code == 400, (path, body[:60])


def test_a_field_cannot_hide_in_an_encoding(oracle: Server) -> None:
    """Escapes and UTF-16 mean the same to the routes, so they must to us."""
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 60}, "length_target": 9}
    text = json.dumps(body)
    for content in (text.replace("length_", "length\\u005f").encode(), text.encode("utf-16"), text.encode("utf-32-le")):
        assert raw(oracle, content).json()["lenvm"]["achieved"] == 9
    assert raw(oracle, text.replace("9}", "0}").encode("utf-16-le")).status_code == 400


def test_clients_that_hang_up_at_any_byte(oracle: Server) -> None:
    body = json.dumps(
        {"input_ids": PROMPT, "stream": True, "sampling_params": {"max_new_tokens": 300}, "length_target": 40}
    ).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    whole = head.encode() + body
    for cut in [*range(1, len(whole), 23), len(whole)]:
        with socket.create_connection(("127.0.0.1", oracle.port), timeout=30) as client:
            client.sendall(whole[:cut])
            if cut == len(whole):
                client.recv(64)
    assert len(tokens(oracle, {"length_target": 12})) == 12
    assert oracle.process.poll() is None
