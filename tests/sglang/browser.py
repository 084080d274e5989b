"""Headless Chromium over its DevTools protocol, as far as the test of the page `/lenvm` needs it.

    python -m tests.sglang.browser http://127.0.0.1:8000/lenvm docs/page.png

asks for an answer on a running server's page and takes the picture in the documents.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WAIT_SECONDS = 120


class NoBrowserError(RuntimeError):
    """There is no Chromium on this machine."""


def find_browser() -> str:
    """The browser named by LENVM_CHROMIUM, or the first on PATH.

    Raises:
        NoBrowserError: saying what to do.
    """
    named = os.environ.get("LENVM_CHROMIUM")
    found = [named] if named else [path for name in NAMES if (path := shutil.which(name))]
    if not found:
        raise NoBrowserError(
            f"none of {', '.join(NAMES)} is on PATH; install Chromium, name one in LENVM_CHROMIUM, or set "
            "LENVM_BROWSER=none to test the page's logic without a browser."
        )
    return found[0]


class Page:
    """One tab.

    Attributes:
        requested: addresses it asked for.
        complaints: uncaught exceptions and errors of its console.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.requested: list[str] = []
        self.complaints: list[str] = []

    async def listen(self) -> None:
        """Hand answers to who waits for them; ends with the connection."""
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._waiting.pop(said["id"]).set_result(said)
            elif said["method"] == "Network.requestWillBeSent":
                self.requested.append(said["params"]["request"]["url"])
            elif said["method"] == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(said["params"]["exceptionDetails"])[:500])
            elif said["method"] == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.complaints.append(said["params"]["entry"]["text"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        number = next(self._ids)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        said = await asyncio.wait_for(self._waiting[number], WAIT_SECONDS)
        assert "error" not in said, said["error"]
        return dict(said["result"])

    async def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        params = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        result = await self.call("Runtime.evaluate", **params)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not await self.js(f"!!({expression})"):
            assert time.monotonic() < deadline, f"never became true: {expression}"
            await asyncio.sleep(0.05)

    async def open(self, url: str) -> None:
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.protocol.startsWith('http')")

    async def fill(self, **fields: str) -> None:
        """Put values into inputs, as a user's typing would."""
        for name, value in fields.items():
            element = f"document.getElementById({json.dumps(name)})"
            await self.js(f"{element}.value = {json.dumps(value)}; {element}.dispatchEvent(new Event('change'))")

    async def click(self, name: str) -> None:
        await self.js(f"document.getElementById({json.dumps(name)}).click()")

    async def picture(self, path: Path, scheme: str = "light") -> None:
        """A PNG of the page in light or dark."""
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        shot = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser(width: int = 1200, height: int = 680) -> AsyncIterator[Page]:
    """A browser with one tab; ended with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            find_browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--hide-scrollbars", "--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={profile}",
            f"--window-size={width},{height}", "about:blank",
        ]  # fmt: skip
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        try:
            port = await asyncio.wait_for(_port(process), WAIT_SECONDS)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                    tabs = [tab for tab in await response.json() if tab["type"] == "page"]
                async with session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    listening = asyncio.create_task(page.listen())
                    await page.call(
                        "Emulation.setDeviceMetricsOverride",
                        width=width,
                        height=height,
                        deviceScaleFactor=1,
                        mobile=False,
                    )
                    yield page
                    listening.cancel()
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _port(process: asyncio.subprocess.Process) -> int:
    """From "DevTools listening on ws://127.0.0.1:PORT/..."; the rest of stderr is read and dropped."""
    assert process.stderr is not None
    seen = b""
    while line := await process.stderr.readline():
        seen += line
        if match := re.search(rb"listening on ws://127\.0\.0\.1:(\d+)/", line):
            drain = asyncio.create_task(process.stderr.read())
            drain.add_done_callback(lambda task: task.cancelled() or task.exception())
            return int(match.group(1))
    raise RuntimeError(f"the browser ended at its start: {seen[-1000:].decode(errors='replace')}")


async def screenshot(url: str, path: Path, scheme: str = "light", **fields: str) -> None:
    """Ask for an answer and take a picture of it."""
    async with browser() as page:
        await page.open(url)
        await page.fill(**fields)
        await page.click("run")
        await page.until("['done', 'failed'].includes(document.body.dataset.state)")
        await page.picture(path, scheme)


if __name__ == "__main__":
    asyncio.run(screenshot(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:4], target="40", seed="3"))
