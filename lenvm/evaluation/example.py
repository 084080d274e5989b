"""One natural answer with the predicted remaining length after each of its tokens, straight from the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lenvm.evaluation.client import Asker
from lenvm.evaluation.data import NaturalData, NaturalPrompt
from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.pieces import token_pieces
from lenvm.evaluation.plan import Request, stable_seed
from lenvm.evaluation.schema import Example

TRIES = 8
"""Answers drawn; the one closest to WANTED tokens is shown."""
WANTED = 80


async def ask_example(asker: Asker, data: NaturalData, base: Path) -> Example | None:
    """Draw a few unguided answers with `return_length_values` and keep one of readable length.

    Args:
        asker: an entered Asker.
        data: held-out prompts; problems are preferred, as their course can be followed.
        base: directory whose tokenizer turns token ids into readable pieces.

    Returns:
        None if the server returns no values (it serves no LenVM).

    Raises:
        EvaluationError: if the server returns values for another number of tokens than the answer has.
    """
    prompts = data.problems or data.prompts
    order = sorted(prompts, key=lambda p: (abs(float(p.lengths.mean()) - WANTED), p.id))
    shown = []
    for k, prompt in enumerate((order * TRIES)[:TRIES]):
        seed = stable_seed("example", prompt.id, k)
        request = Request("example", "base", prompt.id, None, k, seed, {"return_length_values": True})
        answer = await asker.ask(request, prompt.messages)
        if answer.lenvm is None or answer.lenvm.get("values") is None:
            return None
        if answer.finish_reason == "stop":
            shown.append((answer, prompt))
    if not shown:
        return None
    answer, prompt = min(shown, key=lambda pair: abs(pair[0].length - WANTED))
    lenvm: dict[str, Any] = answer.lenvm or {}
    values = lenvm["values"]
    if len(values) != len(answer.token_ids):
        raise EvaluationError(
            f"the server returned {len(values)} predicted lengths for an answer of {len(answer.token_ids)} tokens; "
            "it needs one a token."
        )
    return Example(
        prompt=_question(prompt),
        text=answer.text,
        length=answer.length,
        finish_reason=answer.finish_reason,
        at_prompt=lenvm.get("predicted_length"),
        tokens=token_pieces(base, [answer.token_ids])[0],
        remaining=[float(v) for v in values],
    )


def _question(prompt: NaturalPrompt) -> str:
    return "\n".join(str(m.get("content", "")) for m in prompt.messages if m.get("role") != "system")
