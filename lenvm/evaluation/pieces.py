"""The text that each token adds, for tables and pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lenvm.evaluation.errors import EvaluationError

UNFINISHED = "\ufffd"


def token_pieces(tokenizer: Path, answers: Sequence[Sequence[int]]) -> list[list[str]]:
    """For each answer one piece a token; joined they are the answer's text.

    A token that holds a part of a character adds nothing; the token that completes it adds the whole. Special tokens
    are named.

    Args:
        tokenizer: directory of the tokenizer.
        answers: token ids.

    Raises:
        EvaluationError: if there is no tokenizer, or a token id lies outside its vocabulary.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(tokenizer))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"no tokenizer can be loaded from {tokenizer} ({str(error).splitlines()[0]}).") from None
    largest = max((max(ids) for ids in answers if len(ids)), default=0)
    if largest >= len(found):
        raise EvaluationError(
            f"an answer holds the token id {largest}, the tokenizer in {tokenizer} has {len(found)}; "
            "give the tokenizer that the samples were drawn with."
        )
    special = set(found.all_special_ids)
    return [_pieces(found, special, list(ids)) for ids in answers]


def _pieces(tokenizer: Any, special: set[int], ids: list[int]) -> list[str]:
    pieces: list[str] = []
    start = read = 0  # what is decoded begins at `start`; tokens before `read` have their pieces
    for i, token in enumerate(ids):
        if token in special:
            pieces.append(str(tokenizer.convert_ids_to_tokens(token)))
            start = read = i + 1
            continue
        before = tokenizer.decode(ids[start:read])
        now = tokenizer.decode(ids[start : i + 1])
        if now.endswith(UNFINISHED) and i + 1 < len(ids):
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        start, read = read, i + 1
    return pieces
