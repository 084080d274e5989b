"""Several servers as one: shared work, the same rows, and one that dies on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from lenvm.sampling.errors import SamplingError
from lenvm.sampling.pool import ServerPool
from lenvm.sampling.prompts import read_prompts
from lenvm.sampling.run import SamplingResult, sample
from lenvm.sampling.servers import OpenAIServer
from lenvm.sampling.settings import SamplingSettings
from tests.sampling.conftest import Scripted, make_handler

SETTINGS = SamplingSettings(n=4, max_tokens=20, concurrency=8, retries=0, seed=7)


@pytest.fixture
def second() -> Iterator[tuple[Scripted, ThreadingHTTPServer]]:
    script = Scripted()
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(script))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield script, server
    server.shutdown()
    server.server_close()
    thread.join()


def draw(prompts: Path, out: Path, *urls: str, names: tuple[str | None, ...] = (None, None)) -> SamplingResult:
    pool = ServerPool([OpenAIServer(url, SETTINGS, None, name) for url, name in zip(urls, names, strict=False)])
    return sample(read_prompts(prompts), out, pool, SETTINGS)


def test_two_servers_share_the_work_and_write_what_one_would(
    prompts_file: Path, tmp_path: Path, url: str, script: Scripted, second: tuple[Scripted, ThreadingHTTPServer]
):
    other = f"http://127.0.0.1:{second[1].server_port}"
    assert draw(prompts_file, tmp_path / "one.jsonl", url).drawn == 48
    before = sum(script.asked.values())
    assert draw(prompts_file, tmp_path / "two.jsonl", url, other).drawn == 48
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    shares = [sum(script.asked.values()) - before, sum(second[0].asked.values())]
    assert sum(shares) == 50  # one question to each at the start
    assert min(shares) >= 10


def test_a_server_that_dies_is_left_out(
    prompts_file: Path, tmp_path: Path, url: str, second: tuple[Scripted, ThreadingHTTPServer]
):
    script, server = second
    script.drop_after = 5

    def close() -> None:
        while sum(script.asked.values()) <= 5:
            time.sleep(0.01)
        server.shutdown()
        server.server_close()

    threading.Thread(target=close, daemon=True).start()
    result = draw(prompts_file, tmp_path / "o.jsonl", url, f"http://127.0.0.1:{server.server_port}")
    assert result.failed == {}
    assert result.drawn == 48
    assert any("went away" in note for note in result.notes)


def test_servers_of_two_models_are_refused(
    prompts_file: Path, tmp_path: Path, url: str, second: tuple[Scripted, ThreadingHTTPServer]
):
    other = f"http://127.0.0.1:{second[1].server_port}"
    with pytest.raises(SamplingError, match="are not alike: model is 'a' and 'b'"):
        draw(prompts_file, tmp_path / "o.jsonl", url, other, names=("a", "b"))
