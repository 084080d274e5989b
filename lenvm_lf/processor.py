"""From a row to what the collator needs: token ids, where the completion begins, and its true length.

State s_t is the prompt and the first t completion tokens, so it sits at position P - 1 + t of prompt + completion,
t = 0..L-1. The last completion token leads to no target state and is not fed. `input_ids` is therefore
(prompt + completion)[:-1], cut at `cutoff_len`, and its last positions from P - 1 on are the targets: L, L-1, ...
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from lenvm_lf.rows import COMPLETION_IDS, ERROR, FINISH, PROMPT_IDS, ROW

COLUMNS = (
    "input_ids",
    "prompt_length",
    "completion_length",
    "censored",
    "length",
    "max_id",
    "prompt_hash",
    "row",
    "skip",
)
LONG_PROMPT = "prompt longer than cutoff_len"


@dataclass
class Encoded:
    """One completion: prompt [P] and completion [L] token ids; censored if it was cut before its stop token."""

    prompt: np.ndarray[Any, Any]
    completion: np.ndarray[Any, Any]
    censored: bool


@dataclass
class LengthValueProcessor:
    """LlamaFactory dataset processor of the stage.

    Attributes:
        template: the host's template, for rows without token ids.
        cutoff_len: longest sequence that is fed. Prompts are never cut: a longer one drops the row.
    """

    template: Any
    tokenizer: Any
    cutoff_len: int

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
        digest = hashlib.blake2b(prompt.astype(np.int32).tobytes(), digest_size=8).digest()
        return features | {
            "input_ids": fed,
            "prompt_length": len(prompt),
            "completion_length": len(completion),
            "censored": encoded.censored,
            "length": len(fed),
            "max_id": int(max(prompt.max(), completion.max())),
            "prompt_hash": int.from_bytes(digest, "big", signed=True),
        }

    def encode(self, example: dict[str, Any]) -> Encoded:
        """Token ids of an aligned example.

        Raises:
            ValueError: one sentence: why the row cannot be used.
        """
        if example.get(ERROR):
            raise ValueError(example[ERROR])
        censored = example.get(FINISH) == "length"
        if example.get(COMPLETION_IDS) is not None and len(example[COMPLETION_IDS]):
            prompt = np.asarray(example[PROMPT_IDS], dtype=np.int32)
            return Encoded(prompt, np.asarray(example[COMPLETION_IDS], dtype=np.int32), censored)
        return self._encode_text(example, censored)

    def _encode_text(self, example: dict[str, Any], censored: bool) -> Encoded:
        """Through the template, with the stop token as last token exactly once (none if censored)."""
        if example.get("_images") or example.get("_videos") or example.get("_audios"):
            raise ValueError("images, videos and audio are not supported yet in stage `lenvm`; use a text data set")
        prompt, response = example["_prompt"], example["_response"]
        if len(prompt) % 2 != 1 or len(response) != 1:
            raise ValueError("a row needs an odd number of prompt messages, ending with the user's, and one response")
        if not response[0]["content"]:
            raise ValueError("the completion is empty")
        prompt_ids, response_ids = self.template.encode_oneturn(
            self.tokenizer, prompt + response, example["_system"] or None, example["_tools"] or None
        )
        stops = set(self.template.get_stop_token_ids(self.tokenizer))
        end = next((i for i, token in enumerate(response_ids) if token in stops), len(response_ids))
        completion = response_ids[:end]
        if not censored:  # the template's own stop token, or the tokenizer's where the template leaves it to the host
            completion += [response_ids[end] if end < len(response_ids) else self.tokenizer.eos_token_id]
        if not completion:
            raise ValueError("the completion is empty")
        if not prompt_ids:
            raise ValueError("the prompt has no tokens")
        return Encoded(np.array(prompt_ids, np.int32), np.array(completion, np.int32), censored)

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
