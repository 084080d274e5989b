"""The LenVM's opinion at every state of given completions, from its directory or from a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.metrics import Floats
from lenvm.evaluation.scoring import TOKENS_A_BATCH, buckets, padded, quiet

ITEMS_A_REQUEST = 8
STATES_AT_ONCE = 256
"""Quantiles spread each state's bins over all lengths up to the longest."""


class Text(NamedTuple):
    """A prompt and its completion as token ids, and whether the completion ended with its stop token."""

    prompt: Sequence[int]
    completion: Sequence[int]
    stopped: bool


@dataclass(frozen=True)
class StateValues:
    """States s_0 .. s_L of a completion of L tokens; each array is [L + 1]. After a stop token all of s_L is 0.

    Attributes:
        value: V in (-1, 0], Eq. 8.
        remaining: predicted remaining length in tokens: E[n] of the length distribution, or the inverted value.
        p10, p50, p90: quantiles of the remaining length; None for a checkpoint without a length distribution.
    """

    value: Floats
    remaining: Floats
    p10: Floats | None = None
    p50: Floats | None = None
    p90: Floats | None = None

    def td_residuals(self, gamma: float) -> Floats:
        """delta of each token, r + gamma V(s_{t+1}) - V(s_t) with r = -(1 - gamma), [L]; negative: it lengthened."""
        return np.asarray(gamma * self.value[1:] - self.value[:-1] - (1.0 - gamma))

    def changes(self) -> Floats:
        """What each token did to the expected total length, in tokens, [L]; positive: it lengthened."""
        return np.asarray(self.remaining[1:] + 1.0 - self.remaining[:-1])


Progress = Callable[[int, int], None]


def values_of(
    texts: Sequence[Text], lenvm: Path | None, server: str | None, progress: Progress = lambda done, total: None
) -> tuple[list[StateValues], float]:
    """Values at every state and the checkpoint's gamma, from a directory or from a server's `/lenvm/values`.

    Raises:
        EvaluationError: unless exactly one of the two is given; or as the one that is asked.
    """
    if (lenvm is None) == (server is None):
        raise EvaluationError("give either the directory of a LenVM or the address of a server that has one.")
    return local_values(lenvm, texts, progress) if lenvm else asyncio.run(_served(str(server), texts, progress))


def local_values(lenvm: Path, texts: Sequence[Text], progress: Progress) -> tuple[list[StateValues], float]:
    """Run a LenVM in this process: float32, right-padded batches of similar length.

    Args:
        lenvm: directory of the length value model.
        texts: what to read.
        progress: called after every batch with texts done and their total.

    Raises:
        EvaluationError: if a text is empty or a token id lies outside the vocabulary.
    """
    import torch

    from lenvm.definitions import length_from_logit
    from lenvm.modeling import LengthValueModel

    quiet()
    model = LengthValueModel.from_pretrained(lenvm, dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    vocabulary = int(model.config.get_text_config().vocab_size)
    for text in texts:
        if not text.prompt or not text.completion or max(*text.prompt, *text.completion) >= vocabulary:
            raise EvaluationError(
                f"a text does not fit the LenVM {lenvm} (vocabulary {vocabulary}, prompt of {len(text.prompt)} and "
                f"completion of {len(text.completion)} tokens); its tokenizer must be the one of the samples."
            )
    found: list[StateValues | None] = [None] * len(texts)
    done = 0
    with torch.inference_mode():
        for batch in buckets([len(t.prompt) + len(t.completion) for t in texts], TOKENS_A_BATCH):
            ids, mask = padded([[*texts[i].prompt, *texts[i].completion] for i in batch], device)
            out = model(input_ids=ids, attention_mask=mask)
            for row, i in enumerate(batch):
                start = len(texts[i].prompt) - 1  # s_0 is the last prompt token
                states = slice(start, start + len(texts[i].completion) + 1)
                columns: dict[str, Any] = {"value": -torch.sigmoid(out.z[row, states].double())}
                if out.length_logits is None:
                    columns["remaining"] = length_from_logit(out.z[row, states].double(), model.lenvm.gamma)
                else:
                    log_q = out.length_logits[row, states].log_softmax(-1)
                    columns["remaining"] = model.bins.expected(log_q)
                    for name, p in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
                        parts = log_q.split(STATES_AT_ONCE)
                        columns[name] = torch.cat([model.bins.quantile(part, p) for part in parts])
                arrays = {name: column.double().cpu().numpy() for name, column in columns.items()}
                if texts[i].stopped:
                    for array in arrays.values():
                        array[-1] = 0.0
                found[i] = StateValues(**arrays)
            done += len(batch)
            progress(done, len(texts))
    return [f for f in found if f is not None], float(model.lenvm.gamma)


async def _served(url: str, texts: Sequence[Text], progress: Progress) -> tuple[list[StateValues], float]:
    import httpx

    root = url.rstrip("/").removesuffix("/v1")
    found: dict[int, StateValues] = {}
    batches = [range(i, min(i + ITEMS_A_REQUEST, len(texts))) for i in range(0, len(texts), ITEMS_A_REQUEST)]
    waiting = iter(batches)
    async with httpx.AsyncClient(timeout=600.0) as client:

        async def work() -> None:
            for batch in waiting:
                items = [{"prompt": list(texts[i].prompt), "completion": list(texts[i].completion)} for i in batch]
                answer = await _checked(client.post(f"{root}/lenvm/values", json={"items": items}), root)
                for i, row in zip(batch, answer["data"], strict=True):
                    quantiles = {k: np.asarray(v, dtype=np.float64) for k, v in row["quantiles"].items()}
                    found[i] = StateValues(np.asarray(row["values"]), np.asarray(row["remaining"]), **quantiles)
                progress(len(found), len(texts))

        info = await _checked(client.get(f"{root}/lenvm/info"), root)
        await asyncio.gather(*(work() for _ in range(4)))
    return [found[i] for i in range(len(texts))], float(info["gamma"])


async def _checked(request: Any, root: str) -> Any:
    import httpx

    try:
        response = await request
    except httpx.HTTPError as error:
        raise EvaluationError(f"the server at {root} does not answer ({type(error).__name__}).") from None
    if response.status_code != 200:
        raise EvaluationError(
            f"the server at {root} gives no values (status {response.status_code}: {response.text[:300]}); "
            "it must be one started with --lenvm-model."
        )
    return response.json()
