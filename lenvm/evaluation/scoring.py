"""What needs a model in this process: the base's own log-probability of a text, and the LenVM's prediction at s_0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.metrics import Floats
from lenvm.format import read_lenvm_config

if TYPE_CHECKING:
    import torch

LOGITS_BYTES = 2**28
"""A batch is cut so that its float32 logits stay below this."""
TOKENS_A_BATCH = 8192
CANDIDATES = 16
"""Candidates of the first token that a lookahead head's prediction sums over: the server's default."""


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


def predict_at_prompt(
    lenvm_dir: Path, prompts: Sequence[Sequence[int]], base_dir: Path | None, sampling: Mapping[str, Any]
) -> PromptPrediction:
    """Predicted L before the first token, from the value and, where there is one, the length distribution.

    A lookahead head predicts as a server does with it: sum_x p(x) q(n - 1 | s_0 + x) over the base's candidates.

    Args:
        lenvm_dir: directory of the length value model.
        prompts: token ids of each prompt, chat template included.
        base_dir: directory of the base model; read where there is a lookahead head.
        sampling: how the completions were drawn (temperature, top_p, top_k, min_p), for the same.

    Raises:
        EvaluationError: a lookahead head without its base model.
    """
    if read_lenvm_config(lenvm_dir).has_lookahead_head:
        if base_dir is None:
            raise EvaluationError(f"{lenvm_dir} looks ahead from its base model; name it with --base.")
        return _predict_ahead(lenvm_dir, prompts, base_dir, sampling)
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
                consistent[batch] = _return_consistent(pmf, model.lenvm.gamma)
                expected[batch] = model.bins.expected(log_q).double().cpu().numpy()
                p50[batch] = model.bins.quantile(log_q, 0.5).double().cpu().numpy()
                p90[batch] = model.bins.quantile(log_q, 0.9).double().cpu().numpy()
    if not has_length:
        return PromptPrediction(value, None, None, None, None, model.lenvm.gamma)
    return PromptPrediction(value, consistent, expected, p50, p90, model.lenvm.gamma)


def _return_consistent(pmf: torch.Tensor, gamma: float) -> Floats:
    """ln E[gamma^n] / ln gamma of P(n) [rows, N], float64 (Eq. 13 and 14)."""
    import torch

    discount = torch.arange(pmf.shape[1], device=pmf.device, dtype=torch.float64) * math.log(gamma)
    return (torch.logsumexp(pmf.log() + discount, -1) / math.log(gamma)).cpu().numpy()


def _predict_ahead(
    lenvm_dir: Path, prompts: Sequence[Sequence[int]], base_dir: Path, sampling: Mapping[str, Any]
) -> PromptPrediction:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lenvm.attached import AttachedHead
    from lenvm.candidates import build_candidates
    from lenvm.distillation.run import stop_tokens
    from lenvm.distillation.states import SampledWith, base_states
    from lenvm.lookahead import prompt_distribution, prompt_summary
    from lenvm.modeling import LengthValueModel

    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lenvm = read_lenvm_config(lenvm_dir)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).to(device).eval()
    if lenvm.attached:
        model: Any = AttachedHead.from_pretrained(lenvm_dir, base_dir).to(device)
    else:
        model = LengthValueModel.from_pretrained(lenvm_dir, dtype=torch.float32).to(device).eval()
    stops = torch.tensor([stop_tokens(base, AutoTokenizer.from_pretrained(base_dir))], device=device)
    how = SampledWith.of(sampling)
    consistent, expected, p50, p90 = (np.full(len(prompts), math.nan) for _ in range(4))
    with torch.inference_mode():
        for batch in buckets([len(p) for p in prompts], TOKENS_A_BATCH):
            ids, mask = padded([list(prompts[i]) for i in batch], device)
            at, last = torch.arange(len(batch), device=device), mask.sum(-1) - 1
            hidden, logits = base_states(base, ids, mask)
            if not lenvm.attached:
                hidden = model.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
            rows = how.rows(len(batch), logits.shape[-1], ids.device)
            found = build_candidates(logits[at, last], rows, stops.expand(len(batch), -1), CANDIDATES)
            log_q = model.lookahead(hidden[at, last], found.token_ids)
            pmf = prompt_distribution(found, log_q, lenvm.length_bins)
            consistent[batch] = _return_consistent(pmf.double(), lenvm.gamma)
            summary = prompt_summary(pmf, (0.5, 0.9)).double().cpu().numpy()
            expected[batch], p50[batch], p90[batch] = summary.T
    return PromptPrediction(consistent, consistent, expected, p50, p90, lenvm.gamma)


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
