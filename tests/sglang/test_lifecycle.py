"""What an operator does to a running server: pausing, flushing, new weights, more requests than fit."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.sglang.conftest import Server
from tests.sglang.models import FAMILIES, make_pair, prompts
from tests.sglang.reference import Reference
from tests.sglang.test_serving import FIELDS, LIMIT, together

pytestmark = pytest.mark.slow


def post(server: Server, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    response = server.post(path, body or {})
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_pause_and_continue(guided: Server, reference: Reference, mode: str) -> None:
    asked = list(zip(prompts(len(FIELDS), seed=70), FIELDS, strict=True))
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.extend(together(guided, asked)))
    asking.start()
    time.sleep(0.15)
    post(guided, "/pause_generation", {"mode": mode})
    time.sleep(0.2)
    post(guided, "/continue_generation")
    asking.join(timeout=120)
    for (prompt, fields), answer in zip(asked, answers, strict=True):
        assert answer["output_ids"] == reference.greedy(prompt, LIMIT, fields), f"{fields}"


def test_flush_cache(guided: Server, reference: Reference) -> None:
    (prompt,) = prompts(1, seed=71)
    fields = {"length_target": 14}
    expected = reference.greedy(prompt, LIMIT, fields)
    assert guided.generate(prompt, LIMIT, fields)["output_ids"] == expected
    post(guided, "/flush_cache")
    again = guided.generate(prompt, LIMIT, fields)
    assert again["meta_info"]["cached_tokens"] == 0
    assert again["output_ids"] == expected


def test_more_requests_than_fit(guided: Server, reference: Reference) -> None:
    """80 at once on a server for 32."""
    asked = list(zip(prompts(8, seed=72), FIELDS[:8], strict=True))
    expected = [reference.greedy(p, LIMIT, f) for p, f in asked]
    with ThreadPoolExecutor(80) as pool:
        answers = list(pool.map(lambda a: guided.generate(a[0], LIMIT, a[1]), asked * 10))
    assert [a["output_ids"] for a in answers] == expected * 10


def test_new_weights_of_the_base(guided: Server, pair: Path, reference: Reference, tmp_path: Path) -> None:
    """The base changes, the length value model and its parameters stay."""
    other = make_pair(tmp_path, FAMILIES["qwen2"], FAMILIES["qwen2"], seed=1)
    changed = Reference(pair, base=other / "base")
    (prompt,) = prompts(1, seed=73)
    fields = {"length_target": 14}
    try:
        post(guided, "/update_weights_from_disk", {"model_path": str(other / "base")})
        assert guided.generate(prompt, LIMIT, fields)["output_ids"] == changed.greedy(prompt, LIMIT, fields)
    finally:
        post(guided, "/update_weights_from_disk", {"model_path": str(pair / "base")})
    expected = reference.greedy(prompt, LIMIT, fields)
    assert expected != changed.greedy(prompt, LIMIT, fields)
    assert guided.generate(prompt, LIMIT, fields)["output_ids"] == expected
