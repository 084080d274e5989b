"""Sampled completions on disk: reading `formatting: lenvm` data sets and judging each row by itself.

A row is one sampled completion (`lenvm sample` writes them, one JSON object a line):

    {"prompt_token_ids": [int], "completion_token_ids": [int], "finish_reason": "stop" | "length", ...}

Token ids are used as they are. A row without token ids may give `messages` (the prompt) and `completion` (text)
instead, which go through the chat template. `images` lists the files that the prompt shows, in order. Every other key
is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LINE = "lenvm_line"
"""Column of a raw JSON line, as `load_lines` makes it."""
PROMPT_IDS, COMPLETION_IDS, FINISH, ROW, ERROR, IMAGES = (
    "_lenvm_prompt_ids",
    "_lenvm_completion_ids",
    "_lenvm_finish_reason",
    "_lenvm_row",
    "_lenvm_error",
    "_lenvm_images",  # JSON text: Arrow would give a column of empty lists no type
)
PLACEHOLDER = "<image>"
"""Where an image goes in the text of a message, as in the host's own formats."""
FINISH_REASONS = ("stop", "length")
ROLES = {"user": "user", "assistant": "assistant", "tool": "observation", "function": "function"}
MAX_ID = 2**31 - 1


class RowError(ValueError):
    """One sentence: what is wrong with a row, the value got and the values allowed."""


def load_lines(path: str, data_files: Any = None, split: Any = None, streaming: bool = False, **_: Any) -> Any:
    """Stand-in for `datasets.load_dataset` for local `formatting: lenvm` files.

    JSON and JSONL files become a two-column data set of raw objects; other file types (parquet, arrow) have a schema
    of their own and go to `datasets`.
    """
    import datasets

    if path != "json" or not data_files:
        return datasets.load_dataset(path, data_files=data_files, split=split, streaming=streaming, **_)
    files = [data_files] if isinstance(data_files, str) else list(data_files)
    lines: list[str] = []
    rows: list[int] = []
    for file in files:
        for number, line in _json_objects(Path(file)):
            lines.append(line)
            rows.append(number)
    if not lines:
        raise ValueError(f"{', '.join(files)}: no rows; sample some completions first (`lenvm sample`).")
    return datasets.Dataset.from_dict({LINE: lines, ROW: rows})


def _json_objects(file: Path) -> Iterator[tuple[int, str]]:
    """(row number from 1, JSON text) of a JSONL file or of a file that holds one JSON array."""
    with file.open(encoding="utf-8", errors="replace") as handle:
        head = handle.read(1)
        handle.seek(0)
        if head == "[":
            for number, item in enumerate(json.load(handle), start=1):
                yield number, json.dumps(item)
            return
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield number, line


def token_ids(row: dict[str, Any], key: str) -> np.ndarray[Any, Any]:
    """[n] int32 token ids of a row.

    Raises:
        RowError: if they are not a list of whole numbers in [0, 2^31).
    """
    value = row.get(key)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list) or any(type(x) is not int for x in value):
        raise RowError(f"`{key}` must be a list of token ids, got {_short(value)}")
    if value and not (min(value) >= 0 and max(value) <= MAX_ID):
        raise RowError(f"`{key}` holds {min(value) if min(value) < 0 else max(value)}, which is no token id")
    return np.array(value, dtype=np.int32)


def parse_row(row: Any) -> dict[str, Any]:
    """Judge one row.

    Returns:
        the host's standard columns (`_prompt`, `_response`, `_system`, ... empty where there is no text) and this
        plug-in's (`_lenvm_*`).

    Raises:
        RowError: if the row cannot be used.
    """
    if not isinstance(row, dict):
        raise RowError(f"a row must be a JSON object, got {_short(row)}")
    finish = row.get("finish_reason")
    has_ids = row.get("completion_token_ids") is not None
    if finish is None and not has_ids:
        finish = "stop"
    if finish not in FINISH_REASONS:
        raise RowError(f"`finish_reason` must be `stop` or `length`, got {_short(finish)}")
    prompt, system = _messages(row.get("messages")) if row.get("messages") is not None else ([], "")
    text = row.get("completion")
    if text is not None and not isinstance(text, str):
        raise RowError(f"`completion` must be text, got {_short(text)}")
    out = _columns(prompt, text or "", system, finish)
    images = row.get("images") or []
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise RowError(f"`images` must be a list of file paths, got {_short(images)}")
    out[IMAGES] = json.dumps(images) if images else ""
    if has_ids:
        out[COMPLETION_IDS] = token_ids(row, "completion_token_ids")
        if not len(out[COMPLETION_IDS]):
            raise RowError("`completion_token_ids` is empty; a finished completion has its stop token at least")
        if row.get("prompt_token_ids") is None and prompt:
            return out  # the prompt goes through the template
        out[PROMPT_IDS] = token_ids(row, "prompt_token_ids")
        if not len(out[PROMPT_IDS]):
            raise RowError("`prompt_token_ids` is empty; the state before the first token needs a prompt")
        return out
    if not prompt or not text:
        raise RowError(
            "a row needs `prompt_token_ids` and `completion_token_ids`, or `messages` and a `completion` that is not "
            f"empty, got the keys {sorted(row)}"
        )
    return out


def _columns(prompt: list[dict[str, str]], completion: str, system: str, finish: str) -> dict[str, Any]:
    return {
        "_prompt": prompt,
        "_response": [{"role": "assistant", "content": completion}],
        "_system": system,
        "_tools": "",
        "_images": None,
        "_videos": None,
        "_audios": None,
        PROMPT_IDS: np.zeros(0, np.int32),  # typed although empty: Arrow takes the column's type from the first rows
        COMPLETION_IDS: np.zeros(0, np.int32),
        FINISH: finish,
        ROW: 0,
        ERROR: "",
        IMAGES: "",
    }


def _messages(value: Any) -> tuple[list[dict[str, str]], str]:
    """The prompt's messages in the host's roles, and the system message."""
    if not isinstance(value, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        raise RowError(f"`messages` must be a list of objects with `role` and `content`, got {_short(value)}")
    texts = [(m["role"], _text(m.get("content"))) for m in value]
    system = "".join(text for role, text in texts[:1] if role == "system")
    rest = texts[1:] if texts and texts[0][0] == "system" else texts
    unknown = sorted({role for role, _ in rest} - set(ROLES))
    if unknown:
        raise RowError(f"`messages` holds the role {unknown[0]!r}, allowed are system (first), {', '.join(ROLES)}")
    return [{"role": ROLES[role], "content": text} for role, text in rest], system


def _text(content: Any) -> str:
    """A message's content: text, or the parts of the OpenAI format with a placeholder for each image."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise RowError(f"the `content` of a message must be text or a list of parts, got {_short(content)}")
    out = []
    for part in content:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            out.append(part["text"])
        elif kind in ("image", "image_url"):
            out.append(PLACEHOLDER)
        else:
            raise RowError(f"a part of `content` must be text, image or image_url, got {_short(part)}")
    return "".join(out)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class SampledRowConverter:
    """LlamaFactory dataset converter for `formatting: lenvm`. A bad row is marked, not dropped: rows are counted and
    reported after the whole data set has been read."""

    def __init__(self, dataset_attr: Any, data_args: Any) -> None:
        self.dataset_attr = dataset_attr
        self.data_args = data_args

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        number = int(example.get(ROW) or 0)
        try:
            row = json.loads(example[LINE]) if LINE in example else example
            out = parse_row(row)
        except json.JSONDecodeError as error:
            out = _columns([], "", "", "stop") | {ERROR: f"not JSON: {error}"}
        except RowError as error:
            out = _columns([], "", "", "stop") | {ERROR: str(error)}
        if out[IMAGES]:
            out[IMAGES] = json.dumps([self._path(path) for path in json.loads(out[IMAGES])])
        return out | {ROW: number}

    def _path(self, path: str) -> str:
        """Beside the data (`media_dir`) if it is there, else as given."""
        beside = Path(self.data_args.media_dir, path)
        return str(beside) if beside.is_file() else path
