"""Scores of the base model and predictions of the LenVM against one-by-one computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lenvm.definitions import length_from_logit
from lenvm.evaluation.data import read_natural
from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.scoring import base_log_probs, buckets, predict_at_prompt
from lenvm.modeling import LengthValueModel


def test_log_probs_equal_an_unbatched_forward(world, monkeypatch):
    data = read_natural(world.prompts, world.samples)
    texts = [(p.token_ids, s.token_ids) for p in data.prompts[:3] for s in p.samples[:5]]
    monkeypatch.setattr("lenvm.evaluation.scoring.TOKENS_A_BATCH", 256)  # several batches
    rows = base_log_probs(world.base, texts)
    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32).eval()
    for (prompt, completion), row in zip(texts, rows, strict=True):
        with torch.inference_mode():
            log_p = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
        expected = [float(log_p[len(prompt) - 1 + j, token]) for j, token in enumerate(completion)]
        assert row == pytest.approx(expected, abs=1e-4)
        assert len(row) == len(completion)  # the stop token is scored as well


def test_predictions_equal_an_unbatched_forward(world):
    data = read_natural(world.prompts, world.samples)
    prompts = [p.token_ids for p in data.prompts]
    found = predict_at_prompt(world.lenvm, prompts)
    model = LengthValueModel.from_pretrained(world.lenvm, dtype=torch.float32).eval()
    gamma = model.lenvm.gamma
    for i, ids in enumerate(prompts):
        with torch.inference_mode():
            out = model(torch.tensor([list(ids)]))
        log_q = out.length_logits[0, -1].log_softmax(-1)
        pmf = model.bins.pmf(log_q).double().numpy()
        n = np.arange(len(pmf))
        assert found.from_value[i] == pytest.approx(float(length_from_logit(out.z[0, -1], gamma)), rel=1e-4)
        assert found.expected is not None
        assert found.from_distribution is not None
        assert found.p50 is not None
        assert found.p90 is not None
        assert found.expected[i] == pytest.approx(float((pmf * n).sum()), rel=1e-4)
        assert found.from_distribution[i] == pytest.approx(np.log((pmf * gamma**n).sum()) / np.log(gamma), rel=1e-4)
        assert found.from_distribution[i] < found.expected[i]  # Appendix F
        assert found.p50[i] == np.searchsorted(pmf.cumsum(), 0.5 - 1e-6)
        assert found.p90[i] == np.searchsorted(pmf.cumsum(), 0.9 - 1e-6)


def test_a_text_of_another_vocabulary_is_refused(world):
    with pytest.raises(EvaluationError, match="does not fit the base model"):
        base_log_probs(world.base, [([1, 2], [100_000])])


def test_buckets_hold_every_item_once_within_the_budget():
    lengths = [5, 90, 7, 3, 40, 12, 200]
    batches = list(buckets(lengths, 100))
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 100
