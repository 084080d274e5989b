"""The page of `lenvm view`: what it holds, and the whole of it in headless Chromium."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.values import StateValues
from lenvm.view.answers import Chosen, choose, outliers, view_of
from lenvm.view.page import render_view, write_view
from tests.sglang.browser import Page, browser

GAMMA = 0.95


def made_up(name: str, stopped: bool = True, seed: int = 0, images: tuple[Path, ...] = ()) -> dict:
    """An answer of twelve tokens; the fifth lengthens it by nine."""
    rng = np.random.default_rng(seed)
    left = np.concatenate([[12.0], 12.0 - np.arange(1, 13)]) + np.concatenate([[0], rng.normal(0, 0.1, 11), [0]])
    left[5:12] += 9.0
    left[-1] = 0.0 if stopped else 9.0
    values = StateValues(-(1 - GAMMA**left), left, p10=0.7 * left, p50=left, p90=1.4 * left)
    tokens = ["So", " it", " is", "\n", " Wait", ",", " no", " </script>", " é", "", "!", "<stop>"]
    return view_of(Chosen(name, "How <b>many</b>?", (1, 2), tuple(range(12)), stopped, images), tokens, values, GAMMA)


def test_outliers_by_hand():
    quiet = np.array([0.0, 0.01, -0.01, 0.02, -0.02, 0.0, 0.01])
    assert not outliers(quiet).any()
    assert outliers(np.append(quiet, -0.3)).tolist() == [False] * 7 + [True]
    assert not outliers(np.zeros(5)).any()
    assert outliers(np.append(np.zeros(40), 1.0)).tolist() == [False] * 40 + [True]  # no spread: the ordinary deviation


def test_what_the_page_reads():
    view = made_up("a")
    assert view["true"] == list(range(12, -1, -1))
    assert view["change"][4] == pytest.approx(9.0, abs=0.5)
    assert view["td"][4] < 0
    assert view["outlier"][4]
    assert len(view["remaining"]) == len(view["low"]) == 13
    assert len(view["tokens"]) == len(view["change"]) == 12
    assert made_up("a", stopped=False)["true"] is None


def test_one_file_that_asks_for_nothing():
    page = render_view([made_up("a"), made_up("b")], "two answers")
    assert "</script> é" not in page  # a token cannot end the script that holds it
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data)["answers"][0]["tokens"][7] == " </script>"
    assert not re.findall(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="(?!data:)', page)


def test_answers_are_chosen_by_prompt_and_controller(tmp_path: Path):
    samples, requests = tmp_path / "s.jsonl", tmp_path / "r.jsonl"
    samples.write_text("".join(
        json.dumps({"prompt_id": p, "prompt_token_ids": [1], "completion_token_ids": [5] * (k + 1), "sample": k,
                    "finish_reason": "stop" if k else "length", "messages": [{"role": "user", "content": f"ask {p}"}]})
        + "\n" for p in "ab" for k in range(4)
    ))  # fmt: skip
    row = {"experiment": "equal_to", "controller": "posterior", "prompt_id": "b", "target": 7, "token_ids": [5] * 7,
           "finish_reason": "stop"}  # fmt: skip
    lines = [{"parameters": {}}, row, {**row, "controller": "base"}, {**row, "prompt_id": "zzz"}]
    requests.write_text("".join(json.dumps(r) + "\n" for r in lines))
    found = choose(samples, requests, answers=2)
    assert [c.name for c in found] == [
        "a · base, sample 0 · 1 tokens", "a · base, sample 1 · 2 tokens", "b · base, sample 0 · 1 tokens",
        "b · base, sample 1 · 2 tokens", "b · equal_to 7, posterior · 7 tokens",
    ]  # fmt: skip
    assert [c.stopped for c in found] == [False, True, False, True, True]
    assert {c.question for c in choose(samples, None, ["b"])} == {"ask b"}
    with pytest.raises(EvaluationError, match="no completion of the prompt 'q'"):
        choose(samples, None, ["q"])


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "red.jpg"
    Image.new("RGB", (600, 300), "red").save(image)
    views = [made_up("first", images=(image,)), made_up("second, cut", False, 1)]
    write_view(views, "two answers", tmp_path / "view.html")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/view.html"
    server.shutdown()
    server.server_close()
    thread.join()


# On a machine without a browser the test below is left out only where someone said so (CONTRIBUTING.md).
if os.environ.get("LENVM_BROWSER") != "none":

    def test_the_page_in_a_browser(address: str, tmp_path: Path) -> None:
        asyncio.run(use_the_page(address, tmp_path))


async def point_at(page: Page, state: int) -> None:
    """Move the mouse to a state of the first answer's curve: plotly reports only what a pointer does."""
    x, y = await page.js(
        f"""(() => {{
          const chart = document.getElementById('chart'), box = chart.getBoundingClientRect();
          const {{ xaxis, yaxis }} = chart._fullLayout;
          const left = chart.data.find((t) => t.name === 'answer: predicted').y[{state}];
          return [box.left + xaxis._offset + xaxis.l2p({state}) + 1, box.top + yaxis._offset + yaxis.l2p(left)];
        }})()"""
    )
    await page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


async def use_the_page(address: str, folder: Path) -> None:
    async with browser(height=900) as page:
        await page.open(address)
        await page.until("document.body.dataset.state === 'ready'")
        assert await page.js("document.querySelectorAll('.t').length") == 12
        assert await page.js("document.getElementById('question').textContent") == "How <b>many</b>?"
        assert await page.js("document.querySelectorAll('.t')[7].textContent") == " </script>"
        await page.until("document.querySelector('#images img').complete")
        assert await page.js("document.querySelector('#images img').naturalWidth") == 480
        assert await page.js("document.querySelector('.t.out').textContent") == " Wait"

        # the token's place on the curve, then the curve's place in the text
        await page.js(
            "document.querySelector('[data-at=\"0,5\"]').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))"
        )
        assert await page.js("document.querySelector('.here').textContent") == " Wait"
        assert await page.js("document.getElementById('chart').layout.shapes[0].x0") == 5
        says = await page.js("document.getElementById('says').textContent")
        assert "token 5" in says and "7 really came" in says and "TD residual −" in says.replace("-", "−")
        await point_at(page, 3)
        await page.until("document.querySelector('.here').dataset.at === '0,3'")
        await point_at(page, 0)
        await page.until("document.getElementById('says').textContent.startsWith('the prompt alone')")

        await page.fill(second="1")
        assert await page.js("document.querySelectorAll('.answer').length") == 2
        assert "its length is not known" in await page.js("document.querySelectorAll('.answer h2')[1].textContent")
        names = "document.getElementById('chart').data.map((t) => t.name).filter((x) => x)"
        assert "compared with: really remained" not in await page.js(names)
        await page.click("against")
        assert await page.js("document.getElementById('chart').data.at(-2).x.at(-1)") == 100
        before = await page.js("document.getElementById('chart').data.length")
        await page.click("band")
        assert await page.js("document.getElementById('chart').data.length") == before - 2
        await page.picture(folder / "view.png")
        assert (folder / "view.png").stat().st_size > 10_000
        assert not page.complaints, page.complaints
        assert {u.split("#")[0] for u in page.requested if not u.startswith("data:")} == {address}
