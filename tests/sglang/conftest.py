"""Real SGLang servers over tiny models: one with a LenVM, one under stress (forced retraction, pages of 4 tokens, other
backbones, a value head only, thinking, an API key), one without a LenVM; all prefill in chunks of 16 tokens. They start
together when the first test asks for one, and end with the session. The one without a LenVM is forked
(`tests.sglang.forked`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import sglang

from lenvm.pipeline.server import CPU_SERVER_ENV, free_port
from tests.hosts import few_models
from tests.sglang.models import CONTEXT, FAMILIES, make_pair
from tests.sglang.plugins import install
from tests.sglang.reference import Reference

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 480
# SGLang 0.5.21 hands out pages by a Triton kernel alone, which no CPU runs
PAGES = () if sglang.__version__ == "0.5.21" else ("--page-size", "4")
API_KEY = "secret"
"""Of the server under stress; the others take requests with and without one."""
COMMON = (
    "--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32", "--sleep-on-idle",
    "--host", "127.0.0.1", "--context-length", str(CONTEXT), "--max-total-tokens", "8192",
    "--max-running-requests", "32",
)  # fmt: skip


def environment(**extra: str) -> dict[str, str]:
    """Of a server process."""
    return {**os.environ, **CPU_SERVER_ENV, **few_models(), "PYTHONPATH": str(ROOT), **extra}


@dataclass
class Server:
    """A running server and its log."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """What a client with the API key sends."""
        return {"Authorization": f"Bearer {API_KEY}"}

    def wait(self) -> Server:
        deadline = time.time() + START_SECONDS
        while time.time() < deadline:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.tail()}"
            try:
                if httpx.get(self.url + "/health", timeout=2).status_code == 200:
                    return self
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"no server after {START_SECONDS} s:\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=self.headers, timeout=120)

    def generate(
        self, ids: list[int], limit: int, fields: dict[str, Any] | None = None, **sampling: Any
    ) -> dict[str, Any]:
        """One greedy request to `/generate` unless `sampling` says otherwise."""
        params = {"max_new_tokens": limit, "temperature": 0, **sampling}
        response = self.post("/generate", {"input_ids": ids, "sampling_params": params, **(fields or {})})
        assert response.status_code == 200, response.text
        return response.json()

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start(log: Path, base: Path, *flags: str, launcher: tuple[str, ...] = ("-m", "sglang.launch_server"),
          plugins: tuple[str, ...] = (), **extra: str) -> Server:  # fmt: skip
    """Start a server in a process group of its own, with plug-ins of the tests beside ours."""
    port = free_port()
    if plugins:
        extra["PYTHONPATH"] = f"{ROOT}:{install(log.with_suffix('.plugins'), *plugins)}"
    command = [sys.executable, *launcher, "--model-path", str(base), *COMMON, "--port", str(port), *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment(**extra), start_new_session=True
        )
    return Server(process, port, log)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("qwen2"), FAMILIES["qwen2"], FAMILIES["qwen2"])


@pytest.fixture(scope="session")
def mixed_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama base with a Qwen3 LenVM (any two backbones will do, if they share a tokenizer) with a value head only."""
    return make_pair(tmp_path_factory.mktemp("mixed"), FAMILIES["llama"], FAMILIES["qwen3"], heads=1)


@pytest.fixture(scope="session")
def reference(pair: Path) -> Reference:
    return Reference(pair)


@pytest.fixture(scope="session")
def mixed_reference(mixed_pair: Path) -> Reference:
    return Reference(mixed_pair, candidates=6)


@pytest.fixture(scope="session")
def _servers(pair: Path, mixed_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    logs = tmp_path_factory.mktemp("logs")
    chunks = ("--chunked-prefill-size", "16")  # the same everywhere, for the same numbers
    metrics = "--enable-metrics"  # it adds to the host's metadata, which is compared
    servers = {
        "guided": start(logs / "guided", pair / "base", "--lenvm-model", str(pair / "lenvm"), *chunks, metrics),
        "stressed": start(
            logs / "stressed",
            mixed_pair / "base",
            *("--lenvm-model", str(mixed_pair / "lenvm"), "--lenvm-max-candidates", "6", *chunks),
            *("--reasoning-parser", "qwen3", "--api-key", API_KEY, *PAGES),
            launcher=("-c", "from sglang.cli.main import main; main()", "serve"),
            SGLANG_TEST_RETRACT="1",
        ),
        "plain": start(logs / "plain", pair / "base", *chunks, metrics, plugins=("forked",)),
    }
    try:
        yield servers
    finally:
        for server in servers.values():
            server.stop()


@pytest.fixture(scope="session")
def guided(_servers: dict[str, Server]) -> Server:
    return _servers["guided"].wait()


@pytest.fixture(scope="session")
def stressed(_servers: dict[str, Server]) -> Server:
    return _servers["stressed"].wait()


@pytest.fixture(scope="session")
def plain(_servers: dict[str, Server]) -> Server:
    return _servers["plain"].wait()
