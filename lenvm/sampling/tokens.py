"""The base model's tokenizer: chat template to prompt token ids, and text back to ids where a server gives none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lenvm.sampling.errors import SamplingError
from lenvm.sampling.images import PART


class PromptTokenizer:
    """A thin wrapper of the Hugging Face tokenizer in a local directory.

    Args:
        directory: a base model or tokenizer directory.
        template: arguments of the chat template (for example `{"enable_thinking": False}`).
    """

    def __init__(self, directory: Path | str, template: dict[str, Any] | None = None) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(directory))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SamplingError(
                f"no tokenizer can be loaded from {directory} ({reason}); give --tokenizer DIR."
            ) from None
        self._directory = directory
        self._template = template or {}
        if self._tokenizer.chat_template is None:
            raise SamplingError(f"the tokenizer in {directory} has no chat template; give one that has.")

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant begins."""
        ids = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, **self._template
        )
        return [int(i) for i in ids]

    def prompt_text(self, messages: list[dict[str, Any]]) -> str:
        """The same as text, with one mark for each image, for a server that has to know how large an image is."""
        text = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self._template
        )
        return str(text)

    def check_images(self, messages: list[dict[str, Any]]) -> None:
        """Whether the chat template shows the images of these messages.

        Raises:
            SamplingError: if it leaves them out, prints them as they are written, or fails over them.
        """
        from jinja2.exceptions import TemplateError

        blind = [
            {**m, "content": [part for part in m["content"] if part != PART]} if isinstance(m["content"], list) else m
            for m in messages
        ]
        try:
            text, rest = self.prompt_text(messages), self.prompt_text(blind)
            printed = [form for form in (str(PART), json.dumps(PART)) if text.count(form) > rest.count(form)]
            good = text != rest and not printed
        except (TemplateError, TypeError):
            good = False
        if not good:
            raise SamplingError(
                f"the chat template in {self._directory} shows no images; give --tokenizer DIR of a model that reads "
                "images."
            )

    def completion_ids(self, text: str, stopped: bool) -> list[int]:
        """Token ids of a completion's text, with the stop token if it stopped: a guess, since text does not determine
        which tokens were drawn."""
        ids = [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]
        return [*ids, int(self._tokenizer.eos_token_id)] if stopped else ids
