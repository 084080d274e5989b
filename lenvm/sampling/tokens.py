"""The base model's tokenizer: chat template to prompt token ids, and text back to ids where a server gives none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lenvm.sampling.errors import SamplingError


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
        self._template = template or {}
        if self._tokenizer.chat_template is None:
            raise SamplingError(f"the tokenizer in {directory} has no chat template; give one that has.")

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant begins."""
        ids = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, **self._template
        )
        return [int(i) for i in ids]

    def completion_ids(self, text: str, stopped: bool) -> list[int]:
        """Token ids of a completion's text, with the stop token if it stopped: a guess, since text does not determine
        which tokens were drawn."""
        ids = [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]
        return [*ids, int(self._tokenizer.eos_token_id)] if stopped else ids
