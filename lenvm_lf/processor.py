"""From a row to what the collator needs: token ids, where the completion begins, and its true length.

State s_t is the prompt and the first t completion tokens, so it sits at position P - 1 + t of prompt + completion,
t = 0..L-1. The last completion token leads to no target state and is not fed. `input_ids` is therefore
(prompt + completion)[:-1], cut at `cutoff_len`, and its last positions from P - 1 on are the targets: L, L-1, ...
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lenvm_lf.rows import COMPLETION_IDS, ERROR, FINISH, IMAGES, PLACEHOLDER, PROMPT_IDS, ROW

COLUMNS = (
    "input_ids",
    "prompt_length",
    "completion_length",
    "censored",
    "length",
    "max_id",
    "prompt_hash",
    "row",
    "images",
    "skip",
)
LONG_PROMPT = "prompt longer than cutoff_len"


@dataclass
class Encoded:
    """One completion: prompt [P] and completion [L] token ids; censored if it was cut before its stop token."""

    prompt: np.ndarray[Any, Any]
    completion: np.ndarray[Any, Any]
    censored: bool
    images: tuple[str, ...] = ()


@dataclass
class LengthValueProcessor:
    """LlamaFactory dataset processor of the stage.

    Attributes:
        template: the host's template, for rows without token ids and for images.
        cutoff_len: longest sequence that is fed. Prompts are never cut: a longer one drops the row.
        processor: the host's multimodal processor; None for a text model.
    """

    template: Any
    tokenizer: Any
    cutoff_len: int
    processor: Any = None
    _image_sizes: dict[str, int] = field(default_factory=dict, repr=False)

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """One output row for each input row; a row that cannot be used has its reason in `skip`."""
        out: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for i in range(len(examples["_prompt"])):
            example = {name: column[i] for name, column in examples.items()}
            for name, value in self._features(example).items():
                out[name].append(value)
        return out

    def _features(self, example: dict[str, Any]) -> dict[str, Any]:
        features: dict[str, Any] = {
            "input_ids": np.zeros(0, np.int32),
            "prompt_length": 0,
            "completion_length": 0,
            "censored": False,
            "length": 0,
            "max_id": 0,
            "prompt_hash": 0,
            "row": int(example.get(ROW) or 0),
            "images": "",
            "skip": "",
        }
        try:
            encoded = self.encode(example)
        except ValueError as error:
            return features | {"skip": str(error)}
        prompt, completion = encoded.prompt, encoded.completion
        if len(prompt) > self.cutoff_len:
            return features | {"skip": LONG_PROMPT}
        fed = np.concatenate([prompt, completion[:-1]])[: self.cutoff_len]
        images = json.dumps(encoded.images) if encoded.images else ""
        digest = hashlib.blake2b(prompt.astype(np.int32).tobytes() + images.encode(), digest_size=8).digest()
        return features | {
            "input_ids": fed,
            "prompt_length": len(prompt),
            "completion_length": len(completion),
            "censored": encoded.censored,
            "length": len(fed),
            "max_id": int(max(prompt.max(), completion.max())),
            "prompt_hash": int.from_bytes(digest, "big", signed=True),
            "images": images,
        }

    def encode(self, example: dict[str, Any]) -> Encoded:
        """Token ids of an aligned example.

        Raises:
            ValueError: one sentence: why the row cannot be used.
        """
        if example.get(ERROR):
            raise ValueError(example[ERROR])
        censored = example.get(FINISH) == "length"
        images = self._images(example)
        given = example.get(COMPLETION_IDS)
        if given is None or not len(given):
            prompt, completion = self._encode_text(example, images, censored)
        else:
            completion = np.asarray(given, dtype=np.int32)
            if len(example[PROMPT_IDS]):
                prompt = self._with_images(np.asarray(example[PROMPT_IDS], dtype=np.int32), images)
            else:
                prompt = np.array(self._apply_template(example, images, "-")[0], np.int32)
        if not len(prompt):
            raise ValueError("the prompt has no tokens")
        return Encoded(prompt, completion, censored, tuple(images))

    def _images(self, example: dict[str, Any]) -> list[str]:
        if example.get("_videos") or example.get("_audios"):
            raise ValueError("stage `lenvm` reads text and images, got videos or audio")
        images = json.loads(example[IMAGES]) if example.get(IMAGES) else list(example.get("_images") or [])
        if images and self.processor is None:
            raise ValueError(f"the row shows {len(images)} image(s), but the model reads text only")
        if not all(isinstance(path, str) for path in images):
            raise ValueError("images must be files named by their paths, got them inside the data set")
        return images

    def _apply_template(self, example: dict[str, Any], images: list[str], response: str) -> tuple[list[int], list[int]]:
        """Token ids of prompt and response, each image in its place."""
        messages = [*example["_prompt"], {"role": "assistant", "content": response}]
        if len(messages) % 2:
            raise ValueError("a row needs an odd number of prompt messages, ending with the user's, and one response")
        if images:
            found = sum(message["content"].count(PLACEHOLDER) for message in messages)
            if found != len(images):
                raise ValueError(f"the messages hold {found} `{PLACEHOLDER}` for {len(images)} image(s)")
            try:
                messages = self.template.mm_plugin.process_messages(messages, images, [], [], self.processor)
            except OSError as error:
                raise ValueError(f"an image cannot be read: {error}") from None
        return self.template.encode_oneturn(
            self.tokenizer, messages, example["_system"] or None, example["_tools"] or None
        )

    def _encode_text(
        self, example: dict[str, Any], images: list[str], censored: bool
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Through the template, with the stop token as last token exactly once (none if censored)."""
        response = example["_response"]
        if len(response) != 1:
            raise ValueError("a row needs an odd number of prompt messages, ending with the user's, and one response")
        if not response[0]["content"]:
            raise ValueError("the completion is empty")
        prompt_ids, response_ids = self._apply_template(example, images, response[0]["content"])
        stops = set(self.template.get_stop_token_ids(self.tokenizer))
        end = next((i for i, token in enumerate(response_ids) if token in stops), len(response_ids))
        completion = response_ids[:end]
        if not censored:  # the template's own stop token, or the tokenizer's where the template leaves it to the host
            completion += [response_ids[end] if end < len(response_ids) else self.tokenizer.eos_token_id]
        if not completion:
            raise ValueError("the completion is empty")
        return np.array(prompt_ids, np.int32), np.array(completion, np.int32)

    def _with_images(self, prompt: np.ndarray[Any, Any], images: list[str]) -> np.ndarray[Any, Any]:
        """Sampled prompt ids with as many image tokens for each image as this processor makes of it.

        A server logs either one token an image or all of them; in the latter case the numbers must agree.
        """
        if self.processor is None:
            return prompt
        token = self.tokenizer.convert_tokens_to_ids(self.template.mm_plugin.image_token)
        at = np.flatnonzero(prompt == token)
        runs = np.split(at, np.flatnonzero(np.diff(at) != 1) + 1) if len(at) else []
        if len(runs) != len(images):
            raise ValueError(f"`prompt_token_ids` shows {len(runs)} image(s), `images` lists {len(images)}")
        parts, done = [], 0
        for run, path in zip(runs, images, strict=True):
            size = self._image_size(path, token)
            if len(run) not in (1, size):
                raise ValueError(
                    f"`prompt_token_ids` has {len(run)} tokens for the image {path}, this processor makes {size}; "
                    "set `image_max_pixels` and `image_min_pixels` as the sampler had them"
                )
            parts += [prompt[done : run[0]], np.full(size, token, np.int32)]
            done = run[-1] + 1
        return np.concatenate([*parts, prompt[done:]])

    def _image_size(self, path: str, token: int) -> int:
        """How many tokens an image takes."""
        if path not in self._image_sizes:
            message = [{"role": "user", "content": PLACEHOLDER}]
            try:
                text = self.template.mm_plugin.process_messages(message, [path], [], [], self.processor)[0]["content"]
            except OSError as error:
                raise ValueError(f"an image cannot be read: {error}") from None
            self._image_sizes[path] = self.tokenizer.encode(text, add_special_tokens=False).count(token)
        return self._image_sizes[path]

    def print_data_example(self, example: dict[str, Any]) -> None:
        """Show one row as the host does for its own stages."""
        if example["skip"]:
            text = f"row {example['row']} is skipped: {example['skip']}"
        else:
            seen = len(example["input_ids"]) - example["prompt_length"] + 1
            text = (
                f"prompt tokens: {example['prompt_length']}, completion tokens: {example['completion_length']}"
                f"{' (censored)' if example['censored'] else ''}, target states: {seen}\n"
                f"inputs:\n{self.tokenizer.decode(example['input_ids'], skip_special_tokens=False)}"
            )
        print(text)  # noqa: T201 - the host prints its example here
