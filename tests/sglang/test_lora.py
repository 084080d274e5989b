"""LoRA adapters of the base model beside a length value model, which reads every request as it is."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.sglang.adapters import make_adapter
from tests.sglang.conftest import Server, start
from tests.sglang.models import prompts
from tests.sglang.reference import Reference
from tests.sglang.test_serving import FIELDS, LIMIT

pytestmark = pytest.mark.slow
FLAGS = ("--enable-lora", "--lora-backend", "torch_native", "--max-loras-per-batch", "2")


@pytest.fixture(scope="module")
def adapter(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(pair / "base", tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def server(pair: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("logs") / "lora"
    paths = ("--lora-paths", f"ours={adapter / 'adapter'}")
    started = start(log, pair / "base", "--lenvm-model", str(pair / "lenvm"), "--chunked-prefill-size", "16", *FLAGS,
                    *paths, plugins=("unpinned", "forked"))  # fmt: skip
    try:
        yield started.wait()
    finally:
        started.stop()


def test_adapted_and_plain_requests_in_one_batch(server: Server, pair: Path, adapter: Path) -> None:
    """The same prompts with the adapter and without, every rule, all at once; then again, on what the cache kept."""
    references = {None: Reference(pair), "ours": Reference(pair, base=adapter / "merged")}
    asked = [
        (name, prompt, fields)
        for name in references
        for prompt, fields in zip(prompts(len(FIELDS), seed=11, shared=40), FIELDS, strict=True)
    ]

    def answer(case: tuple[str | None, list[int], dict[str, Any] | None]) -> list[int]:
        name, prompt, fields = case
        answered = server.generate(prompt, LIMIT, {**(fields or {}), **({"lora_path": name} if name else {})})
        return list(answered["output_ids"])

    expected = [references[name].greedy(prompt, LIMIT, fields) for name, prompt, fields in asked]
    assert sum(a != b for a, b in zip(expected, expected[len(FIELDS) :], strict=False)) > len(FIELDS) // 2, "it adapts"
    for _ in range(2):
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(answer, asked))
        for case, found, wanted in zip(asked, answers, expected, strict=True):
            assert found == wanted, f"{case[0]}, {case[2]}"
