"""Random requests made from `/openapi.json`, right ones and wrong ones, to every route we touch: whatever comes, no
answer is a 5xx and the server lives.

By default the same few requests each time: the outcome depends on the code alone. LENVM_CONFORMANCE_CASES is the
number of requests of a longer run with new ones (a release runs 2000).
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies
from schemathesis import GenerationMode

from tests.sglang.conftest import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
CASES = int(os.environ.get("LENVM_CONFORMANCE_CASES", "60"))
REPEATED = "LENVM_CONFORMANCE_CASES" not in os.environ
OPERATIONS = (
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/generate", "POST"),
    ("/lenvm/predict", "POST"),
    ("/lenvm/values", "POST"),
    ("/lenvm/info", "GET"),
)
# Fields of the host that make every request a trivial refusal (they need hardware, other servers or other flags), and
# would keep the rest of the schema from being exercised.
LEFT_OUT = (
    "bootstrap_", "disagg_", "routed_", "data_parallel_rank", "session", "lora", "image", "video", "audio", "mm_",
    "modalities", "input_embeds", "custom_logit_processor", "custom_params", "watermark", "positional_", "encoder_",
    "decode_tp_size", "return_routed", "return_indexer", "return_hidden_states", "return_sampling_mask",
    "sampling_logprobs_mode", "http_worker_ipc", "received_time", "need_wait", "num_items", "kv_hints", "max_dynamic",
    "min_dynamic", "rid", "background", "external_trace", "task", "multi_item", "token_indices", "max_thinking",
)  # fmt: skip


# What the host defines over dozens of nested types. Making a wrong one takes the generator a minute each, so in wrong
# requests they are left out, or simple, and the other fields are what is wrong.
NESTED = ("tools", "tool_choice", "response_format")
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": {"type": "string"}},
        "required": ["role", "content"],
    },
}


@pytest.fixture(scope="module")
def schemas(guided: Server) -> dict[GenerationMode, Any]:
    """The routes we touch, with targets that a tiny model can reach more often than not."""
    document = httpx.get(guided.url + "/openapi.json", timeout=120).json()
    document["paths"] = {path: document["paths"][path] for path, _ in OPERATIONS}
    models = document["components"]["schemas"]
    for name in ("ChatCompletionRequest", "CompletionRequest", "GenerateReqInput"):
        fields = models[name]["properties"]
        for field in [f for f in fields if f.startswith(LEFT_OUT)]:
            del fields[field]
        fields["length_target"]["anyOf"] += [{"type": "integer", "minimum": 1, "maximum": 40}] * 3
    simple = copy.deepcopy(document)
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        fields = simple["components"]["schemas"][name]["properties"]
        for field in NESTED:
            fields.pop(field, None)
        if "messages" in fields:
            fields["messages"] = MESSAGES
    return {
        GenerationMode.POSITIVE: schemathesis.openapi.from_dict(document),
        GenerationMode.NEGATIVE: schemathesis.openapi.from_dict(simple),
    }


def small(body: Any) -> Any:
    """The same request over few tokens: random limits would make long answers, which test nothing more."""
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_new_tokens", "n", "best_of"):
            value = body.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 2:
                body[name] = 2 + value % (3 if name in ("n", "best_of") else 30)
    return body


def in_range(prompt: Any) -> Any:
    """Token ids of the tiny model's vocabulary in place of any others; no prompt is empty."""
    if isinstance(prompt, list):
        return [in_range(one) for one in prompt] or [7]
    return prompt % 300 if isinstance(prompt, int) and not isinstance(prompt, bool) else prompt or "hello"


PROMPTS = {
    "/v1/chat/completions": ("messages",),
    "/v1/completions": ("prompt",),
    "/generate": ("text", "input_ids"),
    "/lenvm/predict": ("prompt", "messages", "conversations"),
}


def answerable(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A right request made one that has an answer, where the schema cannot say how: one prompt and not two or none,
    known token ids, a target where another length field needs one."""
    if path == "/lenvm/values":
        item = body["items"][0] if body.get("items") else body
        name = "messages" if item.get("messages") else "prompt"
        item = {name: item.get(name) or "hello", "completion": item.get("completion") or "and so on"}
        return {key: value if key == "messages" else in_range(value) for key, value in item.items()}
    name = next((name for name in PROMPTS[path] if body.get(name)), PROMPTS[path][0])
    prompt = body.get(name) or ([{"role": "user", "content": "hello"}] if name == "messages" else "hello")
    body = {key: value for key, value in body.items() if key not in PROMPTS[path]}
    body[name] = in_range(prompt) if name in ("prompt", "text", "input_ids") else prompt
    if path == "/lenvm/predict":
        return body
    if any(value is not None for key, value in body.items() if key.startswith("length_") and key != "length_bias"):
        body["length_target"] = body.get("length_target") or 12
        body.pop("length_bias", None)
    if body.get("n") == 0:
        del body["n"]
    return body


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_no_answer_is_a_5xx(
    guided: Server, schemas: dict[GenerationMode, Any], path: str, method: str, mode: GenerationMode
) -> None:
    if method == "GET" and mode is GenerationMode.NEGATIVE:
        mode = GenerationMode.POSITIVE  # it has nothing that could be wrong
    failures: list[str] = []
    answers: Counter[int] = Counter()
    refusals: Counter[str] = Counter()

    @given(case=schemas[mode][path][method].as_strategy(generation_mode=mode), complete=strategies.booleans())
    @settings(
        max_examples=max(1, CASES // (2 * (len(OPERATIONS) - 1))) if method == "POST" else 1,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
        database=None,
        derandomize=REPEATED,
    )
    def send(case: Any, complete: bool) -> None:
        body = case.body
        if mode is GenerationMode.POSITIVE and method == "POST" and complete and isinstance(body, dict):
            body = answerable(path, body)
        content = None if not isinstance(body, (dict, list, str, int, float, bool)) else json.dumps(small(body))
        try:
            response = httpx.request(
                method, guided.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=120
            )
        except httpx.HTTPError as error:
            pytest.fail(f"{error!r} <- {(content or '')[:2000]}\n{guided.tail()}")
        answers[response.status_code] += 1
        if response.status_code == 400:
            refusals[response.text[:200]] += 1
        if response.status_code >= 500:
            failures.append(f"{response.status_code} {response.text[:300]} <- {(content or '')[:600]}")

    send()
    print(path, mode.value, dict(answers), *refusals.most_common(5), sep="\n    ")
    assert not failures, f"{len(failures)} of {sum(answers.values())}:\n" + "\n".join(failures[:10])
    assert guided.process.poll() is None
    answer = guided.post("/generate", {"text": "hello", "length_target": 5, "length_strict": True})
    assert answer.json()["meta_info"]["completion_tokens"] == 5, "the server lives and guides"
