"""The lookahead head against plain loops, its two kinds of token vectors, attached checkpoints, and the prompt."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lenvm import LengthBins, LengthValueModel, LenvmConfig, LenvmFormatError
from lenvm.attached import AttachedHead, base_hash, save_attached
from lenvm.candidates import Candidates
from lenvm.format import LookaheadShape, read_lenvm_config
from lenvm.heads import LookaheadHead
from lenvm.lookahead import prompt_distribution, prompt_summary, scores_from_distribution

BINS = LengthBins.for_max_length(40)
H, R, V = 6, 5, 11


def head(table: bool, seed: int = 0) -> LookaheadHead:
    torch.manual_seed(seed)
    made = LookaheadHead(H, R, len(BINS), tokens=V if table else None, source_size=None if table else 7)
    made.reset_parameters()
    for bias in (made.b1, made.b2):
        torch.nn.init.normal_(bias)
    return made


@pytest.mark.parametrize("table", [True, False])
def test_head_is_the_loop_over_candidates(table: bool) -> None:
    made = head(table)
    source = None if table else torch.randn(V, 7)
    hidden, tokens = torch.randn(3, 2, H), torch.randint(V, (3, 2, 4))
    logits = made(hidden, tokens, source)
    assert logits.shape == (3, 2, 4, len(BINS)) and logits.dtype == torch.float32
    w1, b1, w2, b2 = (p.double() for p in (made.w1, made.b1, made.w2, made.b2))
    for i in range(3):
        for j in range(2):
            for k in range(4):
                x = int(tokens[i, j, k])
                if table:
                    vector = made.embedding[x].double()
                else:
                    vector = sum(source[x, d].double() * made.projection[d].double() for d in range(7))
                inner = w1 @ hidden[i, j].double() + b1 + vector
                inner = inner / (1 + torch.exp(-inner))
                torch.testing.assert_close(logits[i, j, k].double(), w2 @ inner + b2, rtol=1e-5, atol=1e-5)
    same = made.with_table(source)
    assert same.projection is None
    torch.testing.assert_close(same(hidden, tokens), logits)


def test_projection_without_its_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match="give it as `source`"):
        head(False)(torch.randn(1, H), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="give it as `source`"):
        head(False).with_table(None)


def test_tokens_alike_to_the_backbone_begin_alike() -> None:
    source = torch.randn(V, 7)
    source[3] = source[8]
    for table in (True, False):
        made = head(table)
        made.start_from(source)
        vectors = made.token_vectors(torch.arange(V), source)
        assert torch.equal(vectors[3], vectors[8])
        assert vectors.std().item() == pytest.approx(0.5, rel=1e-4)


def test_value_of_a_distribution() -> None:
    gamma = 0.9
    lenvm = LenvmConfig(gamma=gamma, bins=BINS.centres)
    log_q = torch.randn(4, len(BINS)).log_softmax(-1)
    z = scores_from_distribution(log_q, lenvm).z
    pmf = BINS.pmf(log_q)
    for i in range(4):
        u = 1 - sum(p * gamma**n for n, p in enumerate(pmf[i].tolist()))
        assert 1 / (1 + math.exp(-z[i].item())) == pytest.approx(u, rel=1e-5)


def test_prompt_distribution_is_the_sum_over_tokens() -> None:
    """sum_x p(x) q(n - 1 | s + x) in a loop; a stop token ends the completion at n = 1; empty slots may hold NaN."""
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [1.0, 0.0, 0.0, 0.0]])
    is_stop = torch.tensor([[False, True, False, False], [False, False, False, False]])
    candidates = Candidates(torch.arange(8).view(2, 4), p.log(), is_stop)
    log_q = torch.randn(2, 4, len(BINS)).log_softmax(-1)
    log_q[:, 3] = torch.nan
    pmf = prompt_distribution(candidates, log_q, BINS)
    summary = prompt_summary(pmf, (0.1, 0.5, 0.9))
    for row in range(2):
        expected = [0.0] * (BINS.longest + 2)
        for k in range(4):
            if p[row, k] == 0:
                continue
            if is_stop[row, k]:
                expected[1] += p[row, k].item()
                continue
            for n, q in enumerate(BINS.pmf(log_q[row, k]).tolist()):
                expected[n + 1] += p[row, k].item() * q
        assert pmf[row].tolist() == pytest.approx(expected, abs=1e-6)
        assert summary[row, 0].item() == pytest.approx(sum(n * q for n, q in enumerate(expected)), rel=1e-5)
        median = next(n for n in range(len(expected)) if sum(expected[: n + 1]) >= 0.5 - 1e-6)
        assert summary[row, 2].item() == median


# ----- checkpoints --------------------------------------------------------------------------------------------------


def tiny(directory: Path, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=V, hidden_size=H, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                    num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False)
    )  # fmt: skip
    model.save_pretrained(directory)
    return model


def block(base: Path, **shape: Any) -> LenvmConfig:
    return LenvmConfig(
        gamma=0.9,
        heads=("lookahead",),
        bins=BINS.centres,
        lookahead=LookaheadShape(rank=R, **shape),
        attached=True,
        base_hash=base_hash(base),
        hidden_size=H,
        base_model="tiny",
    )


def test_attached_checkpoints_round_trip(tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    hidden, tokens = torch.randn(3, H), torch.randint(V, (3, 4))
    table = head(True)
    save_attached(tmp_path / "table", block(tmp_path / "base"), table, tmp_path / "base")
    again = AttachedHead.from_pretrained(tmp_path / "table", tmp_path / "base")
    assert torch.equal(again.lookahead(hidden, tokens), table(hidden, tokens).log_softmax(-1))
    config = json.loads((tmp_path / "table/config.json").read_text())
    assert config["architectures"] == ["AttachedForLengthValue"] and config["lenvm"]["attached"] is True

    torch.manual_seed(3)
    projecting = LookaheadHead(H, R, len(BINS))
    projecting.reset_parameters()
    shape = {"embedding": "projection", "source": "model.embed_tokens.weight"}
    save_attached(tmp_path / "projection", block(tmp_path / "base", **shape), projecting, tmp_path / "base")
    again = AttachedHead.from_pretrained(tmp_path / "projection", tmp_path / "base")
    expected = projecting(hidden, tokens, base.model.embed_tokens.weight).log_softmax(-1)
    torch.testing.assert_close(again.lookahead(hidden, tokens), expected)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    model = tiny(tmp_path / "base")
    save_attached(tmp_path / "head", block(tmp_path / "base"), head(True), tmp_path / "base")
    assert base_hash(tmp_path / "base") == base_hash(tmp_path / "base")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    AttachedHead.from_pretrained(tmp_path / "head", tmp_path / "sharded")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[2, 3] += 0.01
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(LenvmFormatError, match=r"another base model \(tiny, hash"):
        AttachedHead.from_pretrained(tmp_path / "head", tmp_path / "trained")
    with pytest.raises(LenvmFormatError, match="no safetensors"):
        AttachedHead.from_pretrained(tmp_path / "head", tmp_path)
    with pytest.raises(LenvmFormatError, match="without a backbone"):
        LengthValueModel.from_pretrained(tmp_path / "head")


def test_damaged_attached_checkpoints(tmp_path: Path) -> None:
    tiny(tmp_path / "base")
    wrong = block(tmp_path / "base").model_copy(update={"lookahead": LookaheadShape(rank=R + 1)})
    save_attached(tmp_path / "head", wrong, head(True), tmp_path / "base")
    with pytest.raises(LenvmFormatError, match=r"must have the shape \(6, 6\)"):
        AttachedHead.from_pretrained(tmp_path / "head", tmp_path / "base")
    (tmp_path / "head/model.safetensors").unlink()
    with pytest.raises(LenvmFormatError, match=r"has no model\.safetensors"):
        AttachedHead.from_pretrained(tmp_path / "head", tmp_path / "base")


@pytest.mark.parametrize("embedding", ["table", "projection"])
def test_lenvm_with_a_lookahead_head_round_trips(embedding: Any, tmp_path: Path) -> None:
    tiny(tmp_path / "base")
    lenvm = LenvmConfig(
        gamma=0.9,
        heads=("value", "length", "lookahead"),
        bins=BINS.centres,
        lookahead=LookaheadShape(rank=R, embedding=embedding, source=None if embedding == "table" else "x"),
    )
    model = LengthValueModel.from_backbone(tmp_path / "base", lenvm).eval()
    model.save_pretrained(tmp_path / "lenvm")
    again, report = LengthValueModel.from_pretrained(tmp_path / "lenvm", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids, tokens = torch.randint(V, (1, 5)), torch.randint(V, (1, 5, 3))
    with torch.no_grad():
        hidden = model.backbone(ids).last_hidden_state
        log_q = model.lookahead(hidden, tokens)
        assert torch.equal(again.eval().lookahead(hidden, tokens), log_q)
        source = model.get_input_embeddings().weight
        torch.testing.assert_close(log_q, model.lookahead_head(hidden, tokens, source).log_softmax(-1))
    plain = LengthValueModel.from_backbone(tmp_path / "base", LenvmConfig(gamma=0.9, bins=BINS.centres))
    with pytest.raises(LenvmFormatError, match="no lookahead head"):
        plain.lookahead(hidden, tokens)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"heads": ["lookahead"]}, "heads must be"),
        ({"lookahead": {"rank": 4}}, "go together"),
        ({"attached": True}, "of an attached length value model must be"),
        ({"attached": True, "heads": ["lookahead"], "lookahead": {"rank": 4}}, "base_hash and hidden_size"),
        ({"base_hash": "ab"}, "base_hash and hidden_size"),
        ({"heads": ["value", "length", "lookahead"], "lookahead": {"rank": 4, "source": "x"}}, "nowhere else"),
        ({"heads": ["value", "length", "lookahead"], "lookahead": {"rank": 0}}, "greater than or equal to 1"),
    ],
)
def test_wrong_blocks(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(LenvmFormatError, match=says):
        LenvmConfig.parse({"gamma": 0.9, "bins": list(BINS.centres), **changes}, "DIR")


def test_block_survives_the_file(tmp_path: Path) -> None:
    tiny(tmp_path / "base")
    lenvm = block(tmp_path / "base")
    save_attached(tmp_path / "head", lenvm, head(True), tmp_path / "base")
    assert read_lenvm_config(tmp_path / "head") == lenvm
