"""A vision-language base model with a vision-language LenVM in a real server, beside transformers."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from tests.sglang.test_serving import FIELDS

pytestmark = pytest.mark.slow

LIMIT = 20
TOWER = ("--mm-attention-backend", "sdpa", "--chunked-prefill-size", "16")
FAMILIES = ("Qwen2_5_VL", "Qwen3VL")


@dataclass(frozen=True)
class Asked:
    """A user's message: pictures, then a text."""

    pictures: tuple[int, ...]
    text: str
    fields: dict[str, Any] | None

    @property
    def prompt(self) -> str:
        return f"<|im_start|>user\n{SHOWN * len(self.pictures)}{self.text}<|im_end|>\n<|im_start|>assistant\n"

    @property
    def images(self) -> list[Image.Image]:
        return [picture(seed) for seed in self.pictures]

    @property
    def messages(self) -> list[dict[str, Any]]:
        shown = [{"type": "image_url", "image_url": {"url": url(image)}} for image in self.images]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": self.text}]}]


def picture(seed: int) -> Image.Image:
    """Noise, of a size that depends on the seed."""
    draw = random.Random(seed)
    size = draw.choice([(56, 84), (112, 56), (84, 84)])
    return Image.frombytes("RGB", size, draw.randbytes(size[0] * size[1] * 3))


def url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def questions(count: int, seed: int) -> list[Asked]:
    """Two of five without a picture, one with two; few pictures, so that most are seen again."""
    draw = random.Random(seed)
    asked = []
    for i in range(count):
        shown = tuple(draw.randrange(4) for _ in range((1, 0, 1, 2, 0)[i % 5]))
        text = " ".join(draw.choice(["hello", "world", "fox", "brown", "maybe"]) for _ in range(draw.randrange(1, 12)))
        asked.append(Asked(shown, text, FIELDS[(i + i // len(FIELDS)) % len(FIELDS)]))
    return asked


def chat(server: Server, asked: Asked, **more: Any) -> dict[str, Any]:
    """One greedy request, and its answer's tokens in `token_ids`."""
    body = {"model": "m", "messages": asked.messages, "max_tokens": LIMIT, "temperature": 0, "return_token_ids": True}
    response = server.post("/v1/chat/completions", {**body, **(asked.fields or {}), **more})
    assert response.status_code == 200, response.text
    answer = response.json()
    return {**answer, "token_ids": answer["choices"][0]["response_token_ids"]}


def together(server: Server, asked: list[Asked]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda one: chat(server, one), asked))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_vision_pair(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


@pytest.fixture(scope="module")
def servers(pairs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    logs = tmp_path_factory.mktemp("logs")

    def begin(name: str, pair: Path, *flags: str, **extra: str) -> Server:
        models = few_models("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
        return start(logs / name, pair / "base", *TOWER, *flags, plugins=("forked",), **models, **extra)

    started = {"plain": begin("plain", pairs[FAMILIES[0]])}
    for name, pair in pairs.items():
        retracting = {"SGLANG_TEST_RETRACT": "1"} if name == FAMILIES[1] else {}
        started[name] = begin(name, pair, "--lenvm-model", str(pair / "lenvm"), **retracting)
    try:
        yield started
    finally:
        for server in started.values():
            server.stop()


@pytest.fixture(scope="module")
def references(pairs: dict[str, Path]) -> dict[str, VisionReference]:
    return {name: VisionReference(pair) for name, pair in pairs.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_guided_greedy_equals_transformers(
    name: str, servers: dict[str, Server], references: dict[str, VisionReference]
) -> None:
    """Images and text, guided and not, in one batch with chunks of 16 tokens; the second family under retraction."""
    server, reference = servers[name].wait(), references[name]
    asked = questions(26 if name == FAMILIES[0] else 13, seed=1)
    answers = together(server, asked)
    steered = 0
    for one, answer in zip(asked, answers, strict=True):
        ids = reference.read(one.prompt, one.images)
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert answer["token_ids"] == reference.greedy(ids, LIMIT, one.fields), f"{one}"
        steered += one.pictures != () and answer["token_ids"] != reference.greedy(ids, LIMIT, None)
    assert steered >= len(asked) // 4, "guidance hardly changed anything, so the comparison proves little"


def test_unguided_answers_are_those_of_a_server_without_lenvm(servers: dict[str, Server]) -> None:
    """In mixed batches the same tokens, and one after the other the same log-probabilities to the bit."""
    guided, plain = servers[FAMILIES[0]].wait(), servers["plain"].wait()
    asked = [
        replace(one, fields={"length_target": 12} if i % 2 else None) for i, one in enumerate(questions(12, seed=2))
    ]
    with_lenvm = together(guided, asked)
    without = together(plain, [replace(one, fields=None) for one in asked])
    for i in range(0, len(asked), 2):
        assert with_lenvm[i]["token_ids"] == without[i]["token_ids"]
        assert "lenvm" not in with_lenvm[i]
    for server in (guided, plain):
        server.post("/flush_cache", {})
    for i, one in enumerate(questions(5, seed=3)):
        one = replace(one, pictures=tuple(100 + 2 * i + j for j in range(len(one.pictures))))
        alone = replace(one, fields=None)
        chat(guided, replace(one, fields={"length_target": 6}))  # the value model sees the image first
        ours, theirs = (chat(server, alone, logprobs=True, top_logprobs=5) for server in (guided, plain))
        assert ours["choices"][0]["logprobs"] == theirs["choices"][0]["logprobs"]


def test_prefixes_with_images_are_reused_within_guided_requests_only(
    servers: dict[str, Server], references: dict[str, VisionReference]
) -> None:
    server, reference = servers[FAMILIES[0]].wait(), references[FAMILIES[0]]
    one = Asked((71,), "hello brown fox", {"length_target": 9})
    prompt = reference.read(one.prompt, one.images)

    def generate(asked: Asked) -> dict[str, Any]:
        shown = {"text": asked.prompt, "image_data": [url(image) for image in asked.images]}
        params = {"max_new_tokens": LIMIT, "temperature": 0}
        response = server.post("/generate", {**shown, "sampling_params": params, **(asked.fields or {})})
        assert response.status_code == 200, response.text
        return response.json()

    expected = reference.greedy(prompt, LIMIT, one.fields)
    generate(replace(one, fields=None))
    image = reference.base.config.image_token_id
    for low, high in ((0, prompt.index(image)), (len(prompt) - 1, len(prompt) - 1)):
        answer = generate(one)
        assert answer["output_ids"] == expected
        assert low <= answer["meta_info"]["cached_tokens"] <= high
    other = replace(one, pictures=(72,))
    ids = reference.read(other.prompt, other.images)
    answer = generate(other)
    assert answer["output_ids"] == reference.greedy(ids, LIMIT, other.fields)
    assert answer["meta_info"]["cached_tokens"] <= ids.index(image), "another image's value KV was reused"


def test_predictions_and_values(servers: dict[str, Server], references: dict[str, VisionReference]) -> None:
    server, reference = servers[FAMILIES[0]].wait(), references[FAMILIES[0]]
    asked = [Asked((5,), "hello", {"return_length_values": True}), Asked((), "hello world", None)]
    bodies = [one.messages for one in asked]
    predicted = server.post("/lenvm/predict", {"conversations": bodies}).json()["data"]
    for one, said in zip(asked, predicted, strict=True):
        ids = reference.read(one.prompt, one.images)
        assert said["prompt_tokens"] == len(ids)
        assert said["predicted_length"] == pytest.approx(reference.expected_length(ids), rel=1e-4)
    answer = chat(server, asked[0], max_tokens=6)
    ids = reference.read(asked[0].prompt, asked[0].images)
    expected = [reference.expected_length(ids + answer["token_ids"][: i + 1]) for i in range(6)]
    assert answer["lenvm"]["values"] == pytest.approx(expected, rel=1e-4)
    refused = server.post("/lenvm/values", {"messages": bodies[0], "completion": "hello"})
    assert refused.status_code == 400
    assert "does not read images yet" in refused.json()["error"]["message"]


@pytest.mark.parametrize("api", ["sglang", "openai"])
def test_sampled_rows_are_what_transformers_makes_of_their_images(
    api: str, servers: dict[str, Server], references: dict[str, VisionReference], tmp_path: Path
) -> None:
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    rows: dict[str, dict[str, Any]] = {
        "one": {"messages": [{"role": "user", "content": "hello <image> fox"}], "images": "0.png"},
        "two": {"messages": [{"role": "user", "content": "hello brown fox"}], "images": ["1.png", "2.png"]},
        "text": {"messages": [{"role": "user", "content": "hello world"}]},
    }
    seen = {"one": f"hello {SHOWN} fox", "two": f"{SHOWN}{SHOWN}hello brown fox", "text": "hello world"}
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"id": name, **row}) + "\n" for name, row in rows.items()))
    words = ["sample", str(prompts), "--out", str(out), "--server", servers["plain"].wait().url, "--api", api]
    done = CliRunner().invoke(main, [*words, "--n", "2", "--max-tokens", str(LIMIT), "--temperature", "0"])
    assert done.exit_code == 0, done.output
    drawn = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt_id"] for row in drawn] == [name for name in rows for _ in range(2)]
    assert [row.get("images", []) for row in drawn[::2]] == [["0.png"], ["1.png", "2.png"], []]
    for row in drawn:
        text = f"<|im_start|>user\n{seen[row['prompt_id']]}<|im_end|>\n<|im_start|>assistant\n"
        ids = references[FAMILIES[0]].read(text, [Image.open(tmp_path / name) for name in row.get("images", [])])
        assert row["prompt_token_ids"] == ids, "all tokens of each image"
        assert row["completion_token_ids"] == references[FAMILIES[0]].greedy(ids, LIMIT, None)
        assert json.loads(parse_row(row)["_lenvm_images"] or "[]") == row.get("images", [])


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_value_model_cannot_read_is_refused(servers: dict[str, Server], stream: bool) -> None:
    server = servers[FAMILIES[0]].wait()
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    sound = {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AAAA"}}
    for part in (video, sound):
        body = {"model": "m", "messages": [{"role": "user", "content": [part]}], "length_target": 8, "stream": stream}
        response = server.post("/v1/chat/completions", body)
        assert response.status_code == 400
        assert f"length_target does not work with {part['type']} yet" in response.json()["error"]["message"]
    features = {"format": "precomputed_embedding", "feature": [[0.0]]}
    body = {"text": SHOWN, "image_data": [features], "length_target": 8, "stream": stream}
    response = server.post("/generate", body)
    assert response.status_code == 400
    assert "image features of format 'precomputed_embedding'" in response.json()["error"]["message"]


def test_starts_that_are_refused(pairs: dict[str, Path], pair: Path) -> None:
    from transformers import AutoConfig

    from lenvm_sglang.model import check_vision
    from lenvm_sglang.settings import StartError

    text, seeing = AutoConfig.from_pretrained(pair / "base"), AutoConfig.from_pretrained(pairs["Qwen2_5_VL"] / "base")
    lenvm = str(pairs["Qwen2_5_VL"] / "lenvm")
    check_vision(lenvm, "Qwen2_5_VLForLengthValue", seeing, True)
    check_vision(str(pair / "lenvm"), "Qwen2ForLengthValue", seeing, True)
    with pytest.raises(StartError, match="which reads images"):
        check_vision(lenvm, "Qwen2_5_VLForLengthValue", text, False)
    with pytest.raises(StartError, match="patch_size 16 and the base model with 14"):
        check_vision(str(pairs["Qwen3VL"] / "lenvm"), "Qwen3VLForLengthValue", seeing, True)
    text.architectures = ["GemmaVForConditionalGeneration"]
    with pytest.raises(StartError, match="multimodal base model GemmaVForConditionalGeneration"):
        check_vision(lenvm, "Qwen2_5_VLForLengthValue", text, True)


def test_images_beside_a_value_model_that_reads_text_are_refused() -> None:
    from lenvm.request import LengthFieldError
    from lenvm_sglang.middleware import CHAT, GENERATE, lift_fields

    one = Asked((1,), "hello", {"length_bias": 1.0})
    bodies = {
        CHAT: {"messages": one.messages},
        GENERATE: {"text": one.prompt, "image_data": [url(image) for image in one.images]},
    }
    for path, body in bodies.items():
        with pytest.raises(LengthFieldError, match="length_bias does not work with images on this server"):
            lift_fields({**body, "length_bias": 1.0}, path, served=True)
        assert lift_fields({**body, "length_bias": 1.0}, path, served=True, sees_images=True)
        assert not lift_fields(body, path, served=True)
    assert lift_fields({"text": "x", "image_data": [None], "length_bias": 1.0}, GENERATE, served=True)
