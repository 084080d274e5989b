"""`lenvm sample` of prompts with images from a real vision-language server, beside transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from lenvm.cli import main
from lenvm_lf.rows import parse_row
from tests.hosts import few_models
from tests.sglang.conftest import Server, start
from tests.sglang.models import SHOWN, make_vision_pair
from tests.sglang.reference import VisionReference
from tests.sglang.test_images import LIMIT, TOWER, picture

pytestmark = pytest.mark.slow

SEEN = {
    "one": f"hello {SHOWN} fox",
    "two": f"{SHOWN}{SHOWN}hello brown fox",
    "text": "hello world",
}
"""What the model is shown of each prompt's message."""


@pytest.fixture(scope="module")
def vision_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_pair(tmp_path_factory.mktemp("vision"), "Qwen2_5_VL")


@pytest.fixture(scope="module")
def server(vision_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("logs") / "sampled"
    started = start(log, vision_pair / "base", *TOWER, **few_models("qwen2_5_vl"))
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    rows: list[dict[str, Any]] = [
        {"id": "one", "messages": [{"role": "user", "content": "hello <image> fox"}], "images": "0.png"},
        {"id": "two", "messages": [{"role": "user", "content": "hello brown fox"}], "images": ["1.png", "2.png"]},
        {"id": "text", "messages": [{"role": "user", "content": "hello world"}]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_sampled_rows_are_what_transformers_makes_of_their_images(
    server: Server, vision_pair: Path, prompts: Path
) -> None:
    reference = VisionReference(vision_pair)
    server.wait()
    drawn = {}
    for api in ("sglang", "openai"):
        out = prompts.with_name(f"{api}.jsonl")
        done = CliRunner().invoke(
            main,
            ["sample", str(prompts), "--out", str(out), "--server", server.url, "--api", api, "--n", "2",
             "--max-tokens", str(LIMIT), "--temperature", "0"],
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        drawn[api] = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["prompt_id"] for row in drawn[api]] == ["one", "one", "two", "two", "text", "text"]
        for row in drawn[api]:
            images = [Image.open(out.parent / name) for name in row.get("images", [])]
            text = f"<|im_start|>user\n{SEEN[row['prompt_id']]}<|im_end|>\n<|im_start|>assistant\n"
            ids = reference.read(text, images)
            assert row["prompt_token_ids"] == ids, "all tokens of each image"
            assert row["completion_token_ids"] == reference.greedy(ids, LIMIT, None)
            assert json.loads(parse_row(row)["_lenvm_images"] or "[]") == row.get("images", [])
    same = ("prompt_token_ids", "completion_token_ids", "messages", "finish_reason", "seed")
    assert [[row[k] for k in same] for row in drawn["sglang"]] == [[row[k] for k in same] for row in drawn["openai"]]
    assert len({tuple(row["completion_token_ids"]) for row in drawn["sglang"]}) == 3
