"""The two ways to ask a server: SGLang's `/generate` with token ids, and OpenAI's `/v1/chat/completions`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lenvm.sampling.errors import SamplingError
from lenvm.sampling.images import data_url, openai_messages
from lenvm.sampling.prompts import Prompt, sample_seed
from lenvm.sampling.settings import SamplingSettings
from lenvm.sampling.tokens import PromptTokenizer
from lenvm.sampling.transport import RequestFailedError, error_text, get_json, post_json

FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True)
class Completion:
    """One drawn completion.

    Attributes:
        prompt_token_ids: the prompt as the model saw it, all tokens of an image included (one for each image where
            the server gave none).
        text: without the stop token.
        token_ids: the stop token included where it stopped; its length is L.
        finish_reason: `stop`, or `length` where max_tokens cut it.
        retokenised: the server gave no token ids; these were made from the text, and may not be those drawn.
        counted: tokens by the server's own count.
    """

    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: str
    retokenised: bool
    counted: int


class Server(ABC):
    """A server that completions are drawn from. `open` first; it finds out what the server can do."""

    group = 1
    """Completions of one prompt that go into one request."""

    def __init__(
        self,
        url: str,
        settings: SamplingSettings,
        tokenizer: Path | None = None,
        model: str | None = None,
        template: dict[str, Any] | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.settings = settings
        self.model = model or ""
        self.token_ids = "server"
        self.seeds_honoured: bool | None = None
        self.notes: list[str] = []
        self._directory = tokenizer
        self._template = template
        self._tokenizer: PromptTokenizer | None = None

    @abstractmethod
    async def open(self, client: httpx.AsyncClient, first: Prompt) -> None:
        """Find model name and abilities.

        Args:
            client: for the requests.
            first: a prompt that will be asked, one with images if any has them.

        Raises:
            SamplingError: if the server cannot be used, or reads no images and `first` has some.
        """

    async def draw(self, client: httpx.AsyncClient, prompt: Prompt, samples: Sequence[int]) -> list[Completion]:
        """The completions with these numbers, `group` of them a request.

        Raises:
            RequestFailedError: if the server refuses or cannot be reached.
        """
        drawn: list[Completion] = []
        for start in range(0, len(samples), self.group):
            part = samples[start : start + self.group]
            try:
                body = self._request(prompt, part)
            except OSError as error:
                raise RequestFailedError(f"an image cannot be read any more: {error}") from None
            answer = await post_json(client, self._address, body, self.settings.retries)
            drawn += self._completions(prompt, part, answer)
        return drawn

    @property
    @abstractmethod
    def _address(self) -> str:
        """Where requests go."""

    @abstractmethod
    def _request(self, prompt: Prompt, samples: Sequence[int]) -> dict[str, Any]:
        """The body of a request for at most `group` completions."""

    @abstractmethod
    def _completions(self, prompt: Prompt, samples: Sequence[int], answer: Any) -> list[Completion]:
        """What came back for it, checked.

        Raises:
            RequestFailedError: if it is not what was asked for.
        """

    async def alive(self, client: httpx.AsyncClient) -> bool:
        """Whether anybody answers at the address."""
        try:
            await client.get(f"{self.url}/v1/models")
        except httpx.TransportError:
            return False
        return True

    def _note_seeds(self, info: dict[str, Any]) -> None:
        self.seeds_honoured = bool(info.get("enable_deterministic_inference", False))
        if not self.seeds_honoured:
            self.notes.append(
                "this server ignores seeds of single requests, so another run draws other samples "
                "(SGLang honours them with --enable-deterministic-inference)."
            )

    async def _name(self, client: httpx.AsyncClient) -> str:
        listed = await get_json(client, f"{self.url}/v1/models")
        try:
            return str(listed["data"][0]["id"])  # type: ignore[index]
        except (TypeError, KeyError, IndexError):
            raise SamplingError(
                f"{self.url}/v1/models names no model; is a server running there? Give --server URL (and --model NAME)."
            ) from None


class SglangServer(Server):
    """`POST /generate` with the prompt's token ids; one request carries a few completions of one prompt, each with a
    seed of its own. Behind SGLang's router it carries one completion, because the router passes on nothing else."""

    group = 8

    async def open(self, client: httpx.AsyncClient, first: Prompt) -> None:
        info = await get_json(client, f"{self.url}/server_info")
        if not isinstance(info, dict) or "model_path" not in info:
            info = await get_json(client, f"{self.url}/get_model_info")  # which the router answers for its servers
            self.group = 1
        if not isinstance(info, dict) or "model_path" not in info:
            raise SamplingError(
                f"{self.url} does not answer /server_info as SGLang does; check --server, or use --api openai."
            )
        self.model = self.model or str(info.get("served_model_name") or info["model_path"])
        if self.group > 1:
            self._note_seeds(info)
        else:
            self.notes.append("a router does not say whether the servers behind it honour seeds.")
        if self._directory is None:
            self._directory = Path(str(info.get("tokenizer_path") or info["model_path"]))
            if not self._directory.is_dir():
                raise SamplingError(
                    f"the server's tokenizer ({self._directory}) is no directory on this machine; give --tokenizer DIR."
                )
        self._tokenizer = PromptTokenizer(self._directory, self._template)
        if first.images:
            await self._check_images(client, first)

    async def _check_images(self, client: httpx.AsyncClient, first: Prompt) -> None:
        # a server of a text model passes over images without a word
        info = await get_json(client, f"{self.url}/{'model_info' if self.group > 1 else 'get_model_info'}")
        if not isinstance(info, dict) or not info.get("has_image_understanding"):
            raise SamplingError(f"{self.model} at {self.url} reads no images; serve a vision-language model.")
        self._opened.check_images(first.messages)

    @property
    def _address(self) -> str:
        return f"{self.url}/generate"

    @property
    def _opened(self) -> PromptTokenizer:
        if self._tokenizer is None:
            raise RuntimeError("open the server first")
        return self._tokenizer

    def _request(self, prompt: Prompt, samples: Sequence[int]) -> dict[str, Any]:
        s = self.settings
        common = {
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k,
            "min_p": s.min_p,
            "max_new_tokens": s.max_tokens,
        }
        asked: dict[str, Any] = {"input_ids": [self._opened.prompt_ids(prompt.messages)] * len(samples)}
        if prompt.images:  # only the server knows how many tokens each takes
            asked = {
                "text": [self._opened.prompt_text(prompt.messages)] * len(samples),
                "image_data": [[data_url(image) for image in prompt.images]] * len(samples),
                "return_prompt_token_ids": True,
            }
        asked["sampling_params"] = [{**common, "sampling_seed": sample_seed(s.seed, prompt.id, k)} for k in samples]
        if self.group == 1:
            return {name: value[0] if isinstance(value, list) else value for name, value in asked.items()}
        return asked

    def _completions(self, prompt: Prompt, samples: Sequence[int], answer: Any) -> list[Completion]:
        answer = [answer] if self.group == 1 and isinstance(answer, dict) else answer
        if not isinstance(answer, list) or len(answer) != len(samples):
            raise RequestFailedError(
                f"/generate answered {len(samples)} prompts with something else than as many completions"
            )
        if prompt.images:
            return [self._completion(_shown_ids(one), one) for one in answer]
        ids = self._opened.prompt_ids(prompt.messages)
        return [self._completion(ids, one) for one in answer]

    @staticmethod
    def _completion(ids: list[int], answer: dict[str, Any]) -> Completion:
        meta = answer.get("meta_info", {})
        finish = meta.get("finish_reason") or {}
        drawn = answer.get("output_ids")
        check_finish(finish.get("type"), finish.get("message", ""))
        if not isinstance(drawn, list) or len(drawn) != meta.get("completion_tokens"):
            raise RequestFailedError(
                "the answer's `output_ids` are not the tokens it counts; is this a server of another version?"
            )
        return Completion(ids, str(answer.get("text", "")), drawn, finish["type"], False, len(drawn))


class OpenAIServer(Server):
    """`POST /v1/chat/completions`, one completion a request: servers disagree about seeds with n > 1.

    SGLang (`response_token_ids`) and vLLM (`token_ids`) return token ids when asked. Where a server does not, the text
    is tokenised again if a tokenizer is given, which is recorded.
    """

    _ask_ids = True

    async def open(self, client: httpx.AsyncClient, first: Prompt) -> None:
        self.model = self.model or await self._name(client)
        info = await get_json(client, f"{self.url}/server_info")
        if isinstance(info, dict) and "enable_deterministic_inference" in info:
            self._note_seeds(info)
        try:
            response = await client.post(self._address, json={**self._request(first, [0]), "max_tokens": 1})
            if response.status_code == 400 and "return_token_ids" in response.text:
                self._ask_ids = False
            elif not response.is_success:
                raise SamplingError(f"{self._address} refuses: HTTP {response.status_code}: {error_text(response)}")
            elif token_ids_of(response.json()) is not None:
                return
        except httpx.TransportError as error:
            raise SamplingError(f"{self._address} cannot be reached ({error}); check --server.") from None
        if self._directory is None:
            raise SamplingError(
                f"{self.url} returns no token ids; give --tokenizer DIR to tokenise the texts again (inexact), "
                "or sample from SGLang or vLLM, which return them."
            )
        self.token_ids = "retokenised"
        self._tokenizer = PromptTokenizer(self._directory, self._template)
        if first.images:
            self._tokenizer.check_images(first.messages)
        self.notes.append(
            "the server returns no token ids: completions are tokenised again from their text, which may differ from "
            'what was drawn; rows are marked "token_ids": "retokenised".'
        )

    @property
    def _address(self) -> str:
        return f"{self.url}/v1/chat/completions"

    def _request(self, prompt: Prompt, samples: Sequence[int]) -> dict[str, Any]:
        s = self.settings
        (sample,) = samples
        body: dict[str, Any] = {
            "model": self.model,
            "messages": openai_messages(prompt.messages, prompt.images) if prompt.images else prompt.messages,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "max_tokens": s.max_tokens,
            "seed": sample_seed(s.seed, prompt.id, sample),
        }
        if self._ask_ids:
            body["return_token_ids"] = True
        # not OpenAI's own fields: sent only where they do something
        if s.top_k != -1:
            body["top_k"] = s.top_k
        if s.min_p:
            body["min_p"] = s.min_p
        if self._template:
            body["chat_template_kwargs"] = self._template
        return body

    def _completions(self, prompt: Prompt, samples: Sequence[int], answer: Any) -> list[Completion]:
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] or ""
            counted = int(answer["usage"]["completion_tokens"])
        except (KeyError, IndexError, TypeError):
            raise RequestFailedError("the answer has no `choices` with a `message`, or no `usage`") from None
        finish = choice.get("finish_reason")
        check_finish(finish, "")
        if self._tokenizer is not None:
            ids = self._tokenizer.prompt_ids(prompt.messages)
            made = self._tokenizer.completion_ids(text, stopped=finish == "stop")
            return [Completion(ids, text, made, finish, True, counted)]
        found = token_ids_of(answer)
        if found is None:
            raise RequestFailedError("the answer has no token ids although the server gave some before")
        if len(found[1]) != counted:
            raise RequestFailedError(f"the answer has {len(found[1])} token ids but counts {counted} completion tokens")
        return [Completion(found[0], text, found[1], finish, False, counted)]


def _shown_ids(answer: Any) -> list[int]:
    """Prompt token ids that `/generate` was asked to return."""
    ids = answer.get("prompt_token_ids")
    if not isinstance(ids, list):
        raise RequestFailedError("the answer has no `prompt_token_ids`; take SGLang 0.5.21 or newer, or --api openai")
    return ids


def token_ids_of(answer: Any) -> tuple[list[int], list[int]] | None:
    """(prompt, completion) token ids of a chat answer as SGLang or vLLM gives them; None if it has none."""
    try:
        choice = answer["choices"][0]
    except (KeyError, IndexError, TypeError):
        return None
    prompt = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
    completion = choice.get("response_token_ids") or choice.get("token_ids")
    return (prompt, completion) if isinstance(prompt, list) and isinstance(completion, list) else None


def check_finish(reason: Any, message: str) -> None:
    """Raise RequestFailedError unless a completion ended by its stop token or by max_tokens."""
    if reason not in FINISH_REASONS:
        more = f": {message}" if message else ""
        raise RequestFailedError(f"finish_reason is {reason!r}, a plain completion ends with `stop` or `length`{more}")


def api_key_header() -> dict[str, str]:
    """Authorization from OPENAI_API_KEY, if it is set."""
    key = os.environ.get("OPENAI_API_KEY", "")
    return {"Authorization": f"Bearer {key}"} if key else {}
