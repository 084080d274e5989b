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
    """A prompt and its completion as token ids, whether the completion ended with its stop token, and the prompt's
    images."""

    prompt: Sequence[int]
    completion: Sequence[int]
    stopped: bool
    images: Sequence[Path] = ()


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
        EvaluationError: unless exactly one of the two is given, or for images with a server; or as the one that is
            asked.
    """
    if (lenvm is None) == (server is None):
        raise EvaluationError("give either the directory of a LenVM or the address of a server that has one.")
    if server is not None and any(t.images for t in texts):
        raise EvaluationError("`/lenvm/values` of a server reads no images; give the directory of the LenVM, --lenvm.")
    return local_values(lenvm, texts, progress) if lenvm else asyncio.run(_served(str(server), texts, progress))


def local_values(lenvm: Path, texts: Sequence[Text], progress: Progress) -> tuple[list[StateValues], float]:
    """Run a LenVM in this process: float32, right-padded batches of similar length.

    Args:
        lenvm: directory of the length value model.
        texts: what to read.
        progress: called after every batch with texts done and their total.

    Raises:
        EvaluationError: if a text is empty, a token id lies outside the vocabulary, or images cannot be read.
    """
    import torch

    from lenvm.evaluation.vision import ImageReader
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
    found: dict[int, StateValues] = {}
    plain = [i for i, text in enumerate(texts) if not text.images]
    with torch.inference_mode():
        for batch in buckets([len(texts[i].prompt) + len(texts[i].completion) for i in plain], TOKENS_A_BATCH):
            rows = [plain[k] for k in batch]
            ids, mask = padded([[*texts[i].prompt, *texts[i].completion] for i in rows], device)
            out = model(input_ids=ids, attention_mask=mask)
            for row, i in enumerate(rows):
                found[i] = _states(model, out, row, len(texts[i].prompt), texts[i])
            progress(len(found), len(texts))
        reader = ImageReader(lenvm, model.config) if len(plain) < len(texts) else None
        for i, text in enumerate(texts):
            if reader is None or not text.images:
                continue
            prompt, seen = reader.prompt(text.prompt, text.images)
            ids, mask = padded([[*prompt, *text.completion]], device)
            marks = ids.eq(reader.image_token).long()
            images = {name: tensor.to(device) for name, tensor in seen.items()}
            out = model(input_ids=ids, attention_mask=mask, mm_token_type_ids=marks, **images)
            found[i] = _states(model, out, 0, len(prompt), text)
            progress(len(found), len(texts))
    return [found[i] for i in range(len(texts))], float(model.lenvm.gamma)


def _states(model: Any, out: Any, row: int, prompt_length: int, text: Text) -> StateValues:
    """Of one row of a forward, whose first `prompt_length` tokens are the prompt."""
    import torch

    from lenvm.definitions import length_from_logit

    start = prompt_length - 1  # s_0 is the last prompt token
    states = slice(start, start + len(text.completion) + 1)
    columns: dict[str, Any] = {"value": -torch.sigmoid(out.z[row, states].double())}
    if out.length_logits is None:
        columns["remaining"] = length_from_logit(out.z[row, states].double(), model.lenvm.gamma)
    else:
        log_q = out.length_logits[row, states].log_softmax(-1)
        columns["remaining"] = model.bins.expected(log_q)
        for name, p in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
            columns[name] = torch.cat([model.bins.quantile(part, p) for part in log_q.split(STATES_AT_ONCE)])
    arrays = {name: column.double().cpu().numpy() for name, column in columns.items()}
    if text.stopped:
        for array in arrays.values():
            array[-1] = 0.0
    return StateValues(**arrays)


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
