"""Scores of the base model and predictions of the LenVM against one-by-one computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lenvm.attached import base_hash, save_attached
from lenvm.bins import LengthBins
from lenvm.definitions import length_from_logit
from lenvm.evaluation.data import read_natural
from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.scoring import base_log_probs, buckets, predict_at_prompt
from lenvm.format import LenvmConfig, LookaheadShape
from lenvm.heads import LookaheadHead
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
    found = predict_at_prompt(world.lenvm, prompts, world.base, {})
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


def testbuckets_hold_every_item_once_within_the_budget():
    lengths = [5, 90, 7, 3, 40, 12, 200]
    batches = list(buckets(lengths, 100))
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 100


def test_prediction_of_an_attached_head_is_a_sum_over_first_tokens(world, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32).eval()
    torch.manual_seed(0)
    bins = LengthBins.for_max_length(30)
    head = LookaheadHead(base.config.hidden_size, 6, len(bins), tokens=base.config.vocab_size)
    head.reset_parameters()
    lenvm = LenvmConfig(gamma=0.9, heads=("lookahead",), bins=bins.centres, lookahead=LookaheadShape(rank=6),
                        attached=True, base_hash=base_hash(world.base), hidden_size=head.hidden_size)  # fmt: skip
    save_attached(tmp_path / "head", lenvm, head, world.base)
    prompts = [p.token_ids for p in read_natural(world.prompts, world.samples).prompts[:4]]
    found = predict_at_prompt(tmp_path / "head", prompts, world.base, {"temperature": 0.7, "top_k": 5})
    for i, ids in enumerate(prompts):
        with torch.inference_mode():
            state = base.model(torch.tensor([list(ids)])).last_hidden_state[0, -1]
            p, tokens = torch.softmax(base.lm_head(state) / 0.7, -1).topk(5)
            log_q = head(state, tokens).log_softmax(-1)
        pmf = np.zeros(bins.longest + 2)
        for share, token, q in zip((p / p.sum()).tolist(), tokens.tolist(), log_q, strict=True):
            pmf[1:] += share * (
                np.eye(bins.longest + 1)[0] if token == world.tokenizer.eos_token_id else bins.pmf(q).numpy()
            )
        n = np.arange(len(pmf))
        assert found.expected[i] == pytest.approx((pmf * n).sum(), rel=1e-4)
        assert found.from_distribution[i] == pytest.approx(np.log((pmf * 0.9**n).sum()) / np.log(0.9), rel=1e-4)
        assert found.p50[i] == np.searchsorted(pmf.cumsum(), 0.5 - 1e-6)
