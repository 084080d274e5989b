"""A tiny world for the evaluation: a word-level tokenizer, a random base model, and a server that answers by rule."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from lenvm.format import LenvmConfig
from lenvm.modeling import LengthValueModel
from lenvm.request import LengthFieldError, LengthRequest

WORDS = ["<pad>", "<stop>", "user:", "assistant:", "Answer:", *map(str, range(40)), *(f"w{i}" for i in range(20))]
STOP = 1
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}assistant:"
MAX_TOKENS = 64


@dataclass
class World:
    """Paths of the tiny world and its data in memory."""

    root: Path
    base: Path
    lenvm: Path
    prompts: Path
    samples: Path
    tokenizer: PreTrainedTokenizerFast = field(repr=False)


def answer_ids(prompt_number: int, length: int, right: bool) -> list[int]:
    """`length` tokens, the stop token included, ending in a right or a wrong final answer where there is room."""
    last = str(prompt_number if right else prompt_number + 1)
    tail = [WORDS.index("Answer:"), WORDS.index(last), STOP]
    filler = [WORDS.index(f"w{i % 20}") for i in range(max(0, length - 3))]
    return (filler + tail)[-length:]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Twelve prompts (eight problems) with sixteen samples each."""
    root = tmp_path_factory.mktemp("world")
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<stop>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=STOP, pad_token_id=0,
    )  # fmt: skip
    base = Qwen2ForCausalLM(config)
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    tokenizer = AutoTokenizer.from_pretrained(root / "base")  # its class follows the model's type
    block = LenvmConfig(gamma=0.98, bins=(1, 2, 4, 8, 16, 32, 64))
    LengthValueModel.from_backbone(root / "base", block).save_pretrained(root / "lenvm")
    tokenizer.save_pretrained(root / "lenvm")
    rng = np.random.default_rng(0)
    with (root / "test.jsonl").open("w") as prompts, (root / "samples.jsonl").open("w") as samples:
        for i in range(12):
            messages = [{"role": "user", "content": f"w{i} w{i + 1}"}]
            row: dict[str, Any] = {"id": f"q{i}", "messages": messages, "kind": "problem" if i < 8 else "open"}
            if i < 8:
                row["answer"] = str(i)
            prompts.write(json.dumps(row) + "\n")
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            for k in range(16):
                completion = answer_ids(i, int(rng.integers(4, 50)), bool(rng.random() < 0.75))
                samples.write(json.dumps({
                    "prompt_id": f"q{i}", "messages": messages, "prompt_token_ids": tokenizer(ids)["input_ids"],
                    "completion": tokenizer.decode(completion[:-1]), "completion_token_ids": completion,
                    "finish_reason": "stop", "seed": k, "sample": k, "model": "tiny",
                    "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_tokens": MAX_TOKENS},
                }) + "\n")  # fmt: skip
    return World(root, root / "base", root / "lenvm", root / "test.jsonl", root / "samples.jsonl", tokenizer)


@dataclass
class FakeServer:
    """A chat server that obeys length fields exactly. `seen` holds every body it received."""

    url: str
    seen: list[dict[str, Any]] = field(default_factory=list)
    refuse_after: int | None = None
    with_values: bool = True

    def lengths(self, body: dict[str, Any]) -> int:
        """What the answer's length will be."""
        natural = 5 + body["seed"] % 40
        target = body.get("length_target")
        if target is None:
            bias = body.get("length_bias")
            return natural if bias is None else max(3, natural // 2 if bias < 0 else natural * 2)
        mode = body.get("length_mode", "equal_to")
        return {"equal_to": target, "at_most": min(natural, target), "at_least": max(natural, target)}[mode]


def _app(server: FakeServer, tokenizer: PreTrainedTokenizerFast) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "test"}]}

    @app.get("/lenvm/info")
    def info() -> dict[str, Any]:
        return {"gamma": 0.98, "max_candidates": 12}

    @app.post("/lenvm/values")
    async def values(http: Request) -> dict[str, Any]:
        data = []
        for i, item in enumerate((await http.json())["items"]):
            left = [float(n) for n in range(len(item["completion"]), -1, -1)]
            quantiles = dict.fromkeys(("p10", "p50", "p90"), left)
            data.append({"index": i, "values": [0.98**n - 1 for n in left], "remaining": left, "quantiles": quantiles})
        return {"object": "list", "data": data}

    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> Any:
        body = await http.json()
        server.seen.append(body)
        if server.refuse_after is not None and len(server.seen) > server.refuse_after:
            return JSONResponse({"error": {"message": "no more answers", "type": "bad", "code": 400}}, 400)
        try:
            request = LengthRequest.parse(body)
        except LengthFieldError as error:
            return JSONResponse({"error": {"message": str(error), "param": error.param, "code": 400}}, 400)
        number = int(body["messages"][-1]["content"].split()[0][1:])
        ids = answer_ids(number, server.lengths(body), right=body["seed"] % 4 != 0)
        finish = "stop" if len(ids) <= body["max_tokens"] else "length"
        ids = ids[: body["max_tokens"]]
        report: dict[str, Any] | None = None
        if request is not None:
            report = {"predicted_length": 30.0, "target": request.target, "achieved": len(ids)}
            if request.return_values and server.with_values:
                report["values"] = [float(len(ids) - t) for t in range(1, len(ids) + 1)]
        return {
            "id": "x", "object": "chat.completion", "created": 0, "model": "tiny",
            "choices": [{
                "index": 0, "finish_reason": finish, "response_token_ids": ids if body["return_token_ids"] else None,
                "message": {"role": "assistant", "content": tokenizer.decode(ids[:-1] if finish == "stop" else ids)},
                **({"lenvm": report} if report else {}),
            }],
            "usage": {"prompt_tokens": 4, "completion_tokens": len(ids), "total_tokens": 4 + len(ids)},
        }  # fmt: skip

    return app


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """An app on a real socket; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runner = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    for _ in range(200):
        if runner.started:
            break
        time.sleep(0.05)
    assert runner.started
    yield f"http://127.0.0.1:{port}"
    runner.should_exit = True
    thread.join(10)


@pytest.fixture
def fake_server(world: World) -> Iterator[FakeServer]:
    """The server on a real socket."""
    server = FakeServer("")
    with served(_app(server, world.tokenizer)) as server.url:
        yield server
