"""What needs a model in this process: the base's own log-probability of a text, and the LenVM's prediction at s_0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.metrics import Floats

if TYPE_CHECKING:
    import torch

LOGITS_BYTES = 2**28
"""A batch is cut so that its float32 logits stay below this."""
TOKENS_A_BATCH = 8192


@dataclass(frozen=True)
class PromptPrediction:
    """Predictions of L at the last prompt token, each [P].

    Attributes:
        from_value: inverted value, Eq. 5.
        from_distribution: the return-consistent length of the distribution, ln E[gamma^L] / ln gamma, which is what
            L_GT (Eq. 14) estimates; None for a value-only checkpoint, as is everything below.
        expected: E[L].
        p50: median.
        p90: 90th percentile.
        gamma: the checkpoint's discount.
    """

    from_value: Floats
    from_distribution: Floats | None
    expected: Floats | None
    p50: Floats | None
    p90: Floats | None
    gamma: float


def base_log_probs(
    base: Path,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Floats]:
    """log p of every completion token under the base model: full vocabulary, temperature 1, float32.

    Args:
        base: directory of the base model.
        texts: pairs of prompt token ids and completion token ids (stop token included).
        progress: called after every batch with texts done and their total.

    Returns:
        for each text [L] nats.

    Raises:
        EvaluationError: if a text is empty or a token id lies outside the base's vocabulary.
    """
    import torch
    from transformers import AutoModelForCausalLM

    quiet()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    for prompt, completion in texts:
        if not prompt or not completion or max(max(prompt), max(completion)) >= vocabulary:
            raise EvaluationError(
                f"a text does not fit the base model {base} (vocabulary {vocabulary}, prompt of {len(prompt)} and "
                f"completion of {len(completion)} tokens); give the directory of the model that is being served."
            )
    rows: list[Floats] = [np.empty(0)] * len(texts)
    budget = max(256, min(TOKENS_A_BATCH, LOGITS_BYTES // (4 * vocabulary)))
    done = 0
    with torch.inference_mode():
        for batch in buckets([len(p) + len(c) for p, c in texts], budget):
            ids, mask = padded([[*texts[i][0], *texts[i][1]] for i in batch], device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, i in enumerate(batch):
                start, count = len(texts[i][0]), len(texts[i][1])
                # the logits at position j predict token j + 1
                log_p = logits[row, start - 1 : start + count - 1].float().log_softmax(-1)
                picked = log_p.gather(-1, ids[row, start : start + count, None])[:, 0]
                rows[i] = picked.double().cpu().numpy()
            done += len(batch)
            progress(done, len(texts))
    return rows


def predict_at_prompt(lenvm_dir: Path, prompts: Sequence[Sequence[int]]) -> PromptPrediction:
    """Predicted L before the first token, from the value and, where there is one, the length distribution.

    Args:
        lenvm_dir: directory of the length value model.
        prompts: token ids of each prompt, chat template included.
    """
    import torch

    from lenvm.definitions import length_from_logit
    from lenvm.modeling import LengthValueModel

    quiet()
    model = LengthValueModel.from_pretrained(lenvm_dir, dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    size = len(prompts)
    value, consistent, expected, p50, p90 = (np.full(size, math.nan) for _ in range(5))
    has_length = model.lenvm.has_length_head
    with torch.inference_mode():
        for batch in buckets([len(p) for p in prompts], TOKENS_A_BATCH):
            ids, mask = padded([list(prompts[i]) for i in batch], device)
            out = model(input_ids=ids, attention_mask=mask)
            last = mask.sum(-1) - 1
            at = torch.arange(len(batch), device=device)
            value[batch] = length_from_logit(out.z[at, last], model.lenvm.gamma).double().cpu().numpy()
            if has_length:
                log_q = out.length_logits[at, last].log_softmax(-1)
                pmf = model.bins.pmf(log_q).double()  # [rows, longest + 1]
                discount = torch.arange(pmf.shape[1], device=device, dtype=torch.float64) * math.log(model.lenvm.gamma)
                log_mean = torch.logsumexp(pmf.log() + discount, -1)
                consistent[batch] = (log_mean / math.log(model.lenvm.gamma)).cpu().numpy()
                expected[batch] = model.bins.expected(log_q).double().cpu().numpy()
                p50[batch] = model.bins.quantile(log_q, 0.5).double().cpu().numpy()
                p90[batch] = model.bins.quantile(log_q, 0.9).double().cpu().numpy()
    if not has_length:
        return PromptPrediction(value, None, None, None, None, model.lenvm.gamma)
    return PromptPrediction(value, consistent, expected, p50, p90, model.lenvm.gamma)


def quiet() -> None:
    """No second progress bar inside ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def buckets(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, each at most `budget` tokens with padding (one item may exceed it)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # sorted upwards: the newest is the longest
        if batch and lengths[i] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and attention mask, [rows, longest] int64. Right padding leaves causal models' states alone."""
    import torch

    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)
