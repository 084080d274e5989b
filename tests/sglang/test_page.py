"""The page `GET /lenvm`: its logic in a bare JavaScript engine, and the whole of it in headless Chromium."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from py_mini_racer import mini_racer

from lenvm_sglang.endpoints import page as page_source
from tests.sglang.browser import browser
from tests.sglang.conftest import Server

FORM = {"prompt": "hello", "mode": "equal_to", "target": "12", "strict": False, "bias": "-2.5", "temperature": "0.7",
        "seed": "", "limit": "20"}  # fmt: skip


@pytest.fixture(scope="module")
def logic() -> Iterator[Any]:
    """The page's first script, which knows no document: a function that evaluates an expression beside it."""
    (script,) = re.findall(r'<script id="logic">(.*?)</script>', page_source(), re.DOTALL)
    with mini_racer() as engine:
        engine.eval(script)
        yield lambda expression: json.loads(engine.eval(f"JSON.stringify({expression})"))


def body(logic: Any, **changes: Any) -> dict[str, Any]:
    return logic(f"requestBody({json.dumps({**FORM, **changes})})")


def test_the_request_says_what_the_form_says(logic: Any) -> None:
    exact = body(logic)
    assert exact["length_target"] == 12
    assert exact["length_mode"] == "equal_to"
    assert exact["max_tokens"] == 20
    assert "max_tokens" not in body(logic, limit="")
    assert exact["temperature"] == 0.7
    assert exact["return_length_values"] is True
    assert exact["stream"] is True
    assert exact["messages"] == [{"role": "user", "content": "hello"}]
    assert "seed" not in exact
    assert "length_strict" not in exact
    most = body(logic, mode="at_most", strict=True, seed="0", target="50")
    assert (most["length_strict"], most["seed"], most["max_tokens"]) == (True, 0, 20)
    bias = body(logic, mode="bias", strict=True)
    assert {k for k in bias if k.startswith("length")} == {"length_bias"}
    assert bias["length_bias"] == -2.5
    assert not {k for k in body(logic, mode="none") if k.startswith("length")}


def test_requests_of_the_page_pass_the_servers_checks(logic: Any) -> None:
    from lenvm.request import LengthRequest

    for mode in ("equal_to", "at_most", "at_least", "bias", "none"):
        for strict in (False, True):
            request = LengthRequest.parse(body(logic, mode=mode, strict=strict))
            assert request is not None
            assert request.return_values


def events() -> list[dict[str, Any]]:
    def chunk(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": None, **more}]}

    report = {"predicted_length": 4.5, "target": 4, "achieved": 4, "values": [3.0, 2.0, 1.5, 0.0]}
    return [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "A"}, lenvm_delta={"predicted_length": 4.5, "values": [3.0]}),
        chunk({"content": "é\n\n<b>"}, lenvm_delta={"predicted_length": 4.5, "values": [2.0, 1.5]}),
        chunk({}, finish_reason="stop", lenvm=report, lenvm_delta={"predicted_length": 4.5, "values": [0.0]}),
        {"choices": [], "usage": {"completion_tokens": 4}},
    ]


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_a_stream_becomes_an_answer_however_it_is_cut(logic: Any, size: int) -> None:
    raw = "".join(f"data: {json.dumps(e)}\n\n" for e in events()) + "data: [DONE]\n\n"
    pieces = json.dumps([raw[i : i + size] for i in range(0, len(raw), size)])
    got = logic(
        f"""(() => {{
          const reader = new EventReader(), answer = new Answer(4);
          for (const piece of {pieces}) for (const data of reader.feed(piece)) answer.take(data);
          return {{ ...answer, curve: answer.curve(), left: answer.left() }};
        }})()"""
    )
    assert [p["text"] for p in got["pieces"]] == ["A", "é\n\n<b>", ""]
    assert [p["first"] for p in got["pieces"]] == [0, 1, 3]
    assert got["values"] == [3.0, 2.0, 1.5, 0.0]
    assert got["curve"] == [4.5, 3.0, 2.0, 1.5, 0.0]
    assert got["left"] == 0.0
    assert got["report"]["achieved"] == 4
    assert got["error"] is None


def test_an_error_inside_a_stream_is_kept(logic: Any) -> None:
    said = json.dumps(json.dumps({"error": {"message": "no room."}}))
    assert logic(f"(() => {{ const a = new Answer(null); a.take({said}); return a; }})()")["error"] == "no room."


def test_the_plot_has_a_point_for_every_state_inside_its_frame(logic: Any) -> None:
    pad = {"left": 40, "right": 10, "top": 10, "bottom": 20}
    for curve, target in (([4.5, 3, 2, 0], 4), ([], 40), ([1.0], None), ([900.0, 1], 5), ([0.2, 0], None)):
        found = logic(f"plot({json.dumps(curve)}, {json.dumps(target)}, 800, 200, {json.dumps(pad)})")
        points = [tuple(map(float, p)) for p in re.findall(r"[ML]([\d.]+) ([\d.]+)", found["path"])]
        assert len(points) == len(curve)
        assert all(40 <= x <= 790 and 10 <= y <= 180 for x, y in points)
        assert found["top"] >= max([1, *curve, target or 0])
        assert (found["wanted"] is None) == (target is None)


# ----- the whole page -----------------------------------------------------------------------------------------------

# On a machine without a browser the tests below are left out only where someone said so (CONTRIBUTING.md).
if os.environ.get("LENVM_BROWSER") != "none":

    @pytest.mark.slow
    def test_the_page_in_a_browser(guided: Server, tmp_path: Path) -> None:
        asyncio.run(use_the_page(guided, tmp_path))


# Notes inside the page how many pieces there were at each change, so that a slow test misses none.
WATCH = """
window.steps = []; window.whenTokens = () => {};
new MutationObserver(() => {
  const pieces = document.querySelectorAll('.token').length;
  if (pieces) { steps.push(pieces); whenTokens(); }
}).observe(document.getElementById('answer'), { childList: true });
"""


async def use_the_page(server: Server, folder: Path) -> None:
    async with browser() as page:
        await page.open(server.url + "/lenvm")
        await page.until("document.getElementById('model').textContent.includes('Qwen2ForLengthValue')")

        await page.fill(prompt="hello world", mode="equal_to", target="300", seed="1")
        await page.js("document.getElementById('strict').checked = true")
        await page.js(WATCH)
        await page.click("run")
        await page.until("document.body.dataset.state !== 'running'")
        assert await page.js("document.getElementById('problem').textContent") == ""
        assert await page.js("document.body.dataset.state") == "done"
        pieces = await page.js("document.querySelectorAll('.token').length")
        steps = await page.js("steps")
        assert len(steps) > 1 and steps[0] < pieces, "tokens show while the answer still streams"
        assert await page.js("document.getElementById('count').textContent") == "300"
        assert await page.js("document.getElementById('left').textContent") == "0.0"
        assert await page.js("document.querySelector('.curve').getAttribute('d').split('L').length") == 301
        labels = await page.js("[...document.querySelectorAll('.token small')].map((x) => x.textContent)")
        assert labels[-1] == "0.0"
        assert all(re.fullmatch(r"\d+(\.\d)?", x) for x in labels), labels
        text = await page.js("[...document.querySelectorAll('.token b')].map((x) => x.textContent).join('')")
        assert len(text) > 50
        for scheme in ("light", "dark"):
            await page.picture(folder / f"{scheme}.png", scheme)
            assert (folder / f"{scheme}.png").stat().st_size > 10_000
        assert (folder / "light.png").read_bytes() != (folder / "dark.png").read_bytes()

        await page.fill(mode="bias", bias="5")
        assert await page.js("document.getElementById('target').closest('label').hidden")
        await page.click("run")
        await page.until("document.body.dataset.state === 'done'")
        assert await page.js("document.getElementById('wanted').textContent") == "–"
        assert not page.complaints, page.complaints

        await page.fill(mode="at_least", target="5000")
        await page.click("run")
        await page.until("document.body.dataset.state === 'failed'")
        assert "length_target 5000" in await page.js("document.getElementById('problem').textContent")

        await page.fill(mode="at_least", target="400")
        await page.js("whenTokens = () => document.getElementById('stop').click()")
        await page.click("run")
        await page.until("document.body.dataset.state !== 'running'")
        assert await page.js("document.body.dataset.state") == "stopped"
        assert {url.split("/lenvm")[0].split("/v1")[0].removesuffix("/favicon.ico") for url in page.requested} == {
            server.url
        }
