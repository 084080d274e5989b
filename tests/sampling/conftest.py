"""A small HTTP server on a real socket that answers like SGLang, vLLM or plain OpenAI, and fails on request."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

STOP = 2


class Scripted:
    """What the server does next, and what it was asked."""

    def __init__(self) -> None:
        self.failures: list[int] = []  # status codes answered first
        self.refuse: dict[str, int] = {}  # text or first token of a prompt -> status code, for ever
        self.dialect = "sglang"  # or router, vllm, openai (knows no token ids), strict (refuses the field)
        self.deterministic = True
        self.sees_images = True
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.drop_after: int | None = None  # close connections without an answer after so many requests
        self.retry_after: str | None = None
        self.lock = threading.Lock()

    def completion(self, prompt: object, seed: int, longest: int) -> tuple[list[int], str]:
        """Token ids and finish reason: a function of the prompt and the seed."""
        rng = random.Random(f"{prompt}/{seed}")
        length = rng.randrange(1, 30)
        ids = [rng.randrange(10, 60) for _ in range(length - 1)] + [STOP]
        return (ids, "stop") if length <= longest else (ids[:longest], "length")


def make_handler(script: Scripted) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status == 429 and script.retry_after:
                self.send_header("Retry-After", script.retry_after)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.answer(200, {"data": [{"id": "tiny"}]})
            elif self.path == "/get_model_info" and script.dialect == "router":
                self.answer(200, {"model_path": "/none", "served_model_name": "tiny"})
            elif self.path == "/server_info" and script.dialect == "sglang":
                info = {"model_path": "/none", "served_model_name": "tiny"}
                self.answer(200, {**info, "enable_deterministic_inference": script.deterministic})
            elif self.path == "/model_info" and script.dialect == "sglang":
                self.answer(200, {"has_image_understanding": script.sees_images})
            else:
                self.answer(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with script.lock:
                script.asked[self.path] += 1
                script.bodies.append(body)
                script.in_flight += len(body.get("input_ids", [0]))
                script.most_in_flight = max(script.most_in_flight, script.in_flight)
                status = script.failures.pop(0) if script.failures else 200
                dropped = script.drop_after is not None and sum(script.asked.values()) > script.drop_after
            try:
                if dropped:
                    self.close_connection = True
                    self.connection.close()
                    return
                if "messages" in body:
                    key = body["messages"][-1]["content"]
                else:
                    key = body["text"][0] if "text" in body else json.dumps(body["input_ids"][0])
                    if (script.dialect == "router") == isinstance(body["sampling_params"], list):
                        status = 422  # a router passes single requests on, and nothing else
                status = script.refuse.get(key, status) if isinstance(key, str) else status
                if status != 200:
                    self.answer(status, {"error": {"message": f"scripted {status}"}})
                elif self.path == "/generate":
                    self.generate(body)
                else:
                    self.chat(body)
            finally:
                with script.lock:
                    script.in_flight -= len(body.get("input_ids", [0]))

        def generate(self, body: dict[str, Any]) -> None:
            answers = []
            if script.dialect == "router":
                body = {"input_ids": [body["input_ids"]], "sampling_params": [body["sampling_params"]]}
            prompts = body.get("input_ids") or list(zip(body["text"], body["image_data"], strict=True))
            for prompt, params in zip(prompts, body["sampling_params"], strict=True):
                drawn, why = script.completion(prompt, params["sampling_seed"], params["max_new_tokens"])
                meta = {"finish_reason": {"type": why}, "completion_tokens": len(drawn)}
                answers.append({"text": "x" * len(drawn), "output_ids": drawn, "meta_info": meta})
                if body.get("return_prompt_token_ids"):
                    answers[-1]["prompt_token_ids"] = [7, *[9] * len(prompt[1]), 8]
            self.answer(200, answers[0] if script.dialect == "router" else answers)

        def chat(self, body: dict[str, Any]) -> None:
            if script.dialect == "strict" and "return_token_ids" in body:
                self.answer(400, {"error": {"message": "Unrecognized request argument supplied: return_token_ids"}})
                return
            prompt = [5, 6, 7]
            drawn, why = script.completion(body["messages"], body["seed"], body["max_tokens"])
            choice: dict[str, Any] = {"message": {"content": "hello world"}, "finish_reason": why}
            whole: dict[str, Any] = {"choices": [choice], "usage": {"completion_tokens": len(drawn)}}
            if script.dialect == "sglang":
                choice.update(prompt_token_ids=prompt, response_token_ids=drawn)
            elif script.dialect == "vllm":
                choice.update(token_ids=drawn)
                whole.update(prompt_token_ids=prompt)
            self.answer(200, whole)

    return Handler


@pytest.fixture
def script() -> Scripted:
    return Scripted()


@pytest.fixture
def url(script: Scripted) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(script))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<start>", "<stop>", *letters])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<stop>", pad_token="<pad>")
    fast.chat_template = (
        "{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] }}<stop>{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(directory)
    return directory


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"id": f"p{i}", "messages": [{"role": "user", "content": f"question {i}"}], "kind": "test", "answer": str(i)}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
