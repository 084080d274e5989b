"""A base model whose lengths are known exactly, and a length value model that knows them.

The base is a Markov chain over tokens: a transformer whose layers add nothing, so that the next token's logits are a
function of the last token. A token "k to go" is followed by one that says k - 1 most of the time, and by others
sometimes. The distribution of the remaining length after each token then follows by dynamic programming, and the length
value model's heads are that table: a perfect oracle.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config

from lenvm.format import LenvmConfig
from lenvm.modeling import LengthValueModel, backbone_class
from tests.sglang.models import FIRST_WORD, VOCABULARY, tokenizer

LONGEST = 40
"""k of the highest state."""
HIDDEN = 64
GAMMA = 0.97
BINS = tuple(range(1, 257))
STOP = 2
FORBIDDEN = -40.0


def token(k: int) -> int:
    """The token of "k to go"."""
    return STOP if k == 0 else FIRST_WORD + k


def chain() -> torch.Tensor:
    """[LONGEST + 2, LONGEST + 1] float64 P(next = k | now): rows 1..LONGEST are states, the last row is a prompt."""
    p = torch.zeros(LONGEST + 2, LONGEST + 1, dtype=torch.float64)
    for k in range(1, LONGEST + 1):
        for step, weight in ((-1, 0.55), (1, 0.15), (0, 0.1), (-3, 0.2)):
            p[k, min(max(k + step, 0), LONGEST)] += weight
    for k in (*range(7), 9, 12, 15, 18, 22, 26, 30, 35, 40):  # 16 of them: all are candidates
        p[-1, k] = 1 / 16
    return p


def remaining() -> torch.Tensor:
    """[LONGEST + 1, len(BINS) + 1] float64 P(n tokens to come | state k), the stop token included; row 0 is unused."""
    p = chain()
    out = torch.zeros(LONGEST + 1, BINS[-1] + 1, dtype=torch.float64)
    for n in range(1, BINS[-1] + 1):
        for k in range(1, LONGEST + 1):
            out[k, n] = p[k, 0] if n == 1 else (p[k, 1:] * out[1:, n - 1]).sum()
    out[:, -1] += 1 - out.sum(-1)  # longer ones count as the longest
    return out


def make_oracle_pair(directory: Path) -> Path:
    """Write `directory`/base and `directory`/lenvm."""
    words = tokenizer()
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        eos_token_id=STOP, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    base = backbone_class(config)(config)
    logits = torch.full((LONGEST + 2, VOCABULARY), FORBIDDEN, dtype=torch.float64)
    for row, next_p in enumerate(chain()):
        for k, p in enumerate(next_p.tolist()):
            if p > 0:
                logits[row, token(k)] = math.log(p)
    with torch.no_grad():
        plain(base)
        base.lm_head.weight.zero_()
        base.lm_head.weight[:, : LONGEST + 2] = logits.T.float() / math.sqrt(HIDDEN)
    base.save_pretrained(directory / "base")

    lenvm = LengthValueModel.from_backbone(config, LenvmConfig(gamma=GAMMA, bins=BINS, heads=("value", "length")))
    q = remaining()
    with torch.no_grad():
        plain(lenvm)
        # SiLU(w1 h) is the same number at the state's own place and 0 elsewhere
        inner = float(torch.nn.functional.silu(torch.tensor(math.sqrt(HIDDEN))))
        for head in (lenvm.value_head, lenvm.length_head):
            head.w1.copy_(torch.eye(HIDDEN))
            for parameter in (head.b1, head.b2, head.w2):
                parameter.zero_()
        n = torch.arange(BINS[-1] + 1, dtype=torch.float64)
        discounted = (q * GAMMA**n).sum(-1).clamp(1e-9, 1 - 1e-9)
        z = torch.log1p(-discounted) - torch.log(discounted)  # sigmoid(z) = 1 - E[gamma^n]
        lenvm.value_head.w2[0, : LONGEST + 1] = (z / inner).float()
        log_q = q[:, 1:].clamp(min=1e-26).log()  # zero would have no logarithm; far below any weight that counts
        lenvm.length_head.w2[:, : LONGEST + 1] = (log_q.T / inner).float()
    lenvm.save_pretrained(directory / "lenvm")
    for part in ("base", "lenvm"):
        words.save_pretrained(directory / part)
    return directory


def plain(model: Any) -> None:
    """Make a model's hidden state one-hot, of length sqrt(HIDDEN), in its last token: states 1.., then "a prompt"."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
    table = next(p for n, p in model.named_parameters() if n.endswith("embed_tokens.weight"))
    table.zero_()
    table[:, LONGEST + 1] = 1.0
    for k in range(1, LONGEST + 1):
        table[token(k)] = 0.0
        table[token(k), k] = 1.0
