"""The guidance rules once more, on transformers alone: whole sequences, no KV cache, rules in plain Python.

Nothing of `lenvm.guidance`, `lenvm.candidates` or `lenvm.sampler` is used here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lenvm.attached import AttachedHead
from lenvm.modeling import LengthValueModel


class Reference:
    """A base model and a length value model, both of transformers, in float32."""

    def __init__(self, pair: Path, candidates: int = 16) -> None:
        self.base = AutoModelForCausalLM.from_pretrained(pair / "base", dtype=torch.float32).eval()
        self.stop = self.base.config.eos_token_id
        self.candidates = candidates
        self._load(pair)
        self.gamma = self.value.lenvm.gamma
        self.centres = self.value.lenvm.length_bins.centres
        self.decode = torch.tensor(self._decode_table(), dtype=torch.float64)

    def _load(self, pair: Path) -> None:
        self.value = LengthValueModel.from_pretrained(pair / "lenvm", dtype=torch.float32).eval()

    def _decode_table(self) -> list[list[float]]:
        """P(n | bin), n = 0..N: two-hot weights of every n, normalised per bin."""
        centres = self.centres
        table = [[0.0] * (centres[-1] + 1) for _ in centres]
        for n in range(1, centres[-1] + 1):
            high = next(i for i, c in enumerate(centres) if c >= n)
            if centres[high] == n:
                table[high][n] += 1.0
            else:
                weight = (n - centres[high - 1]) / (centres[high] - centres[high - 1])
                table[high][n] += weight
                table[high - 1][n] += 1 - weight
        return [[x / sum(row) for x in row] for row in table]

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """[V] of the next token."""
        return self.base(torch.tensor([ids])).logits[0, -1].double()

    @torch.no_grad()
    def states(self, sequences: list[list[int]]) -> list[tuple[float | None, list[float]]]:
        """z and P(n), n = 0..N, of the states after sequences of one length."""
        out = self.value(torch.tensor(sequences))
        pmf = torch.softmax(out.length_logits[:, -1].double(), -1) @ self.decode
        return list(zip(out.z[:, -1].tolist(), pmf.tolist(), strict=True))

    def expected_length(self, ids: list[int]) -> float:
        """E[n] of the state after `ids`."""
        return sum(n * p for n, p in enumerate(self.states([ids])[0][1]))

    def greedy(self, prompt: list[int], limit: int, fields: dict[str, Any] | None) -> list[int]:
        """Tokens of a greedy answer under a request's length fields; None is the base model alone."""
        ids, out = list(prompt), []
        while len(out) < limit:
            token = self._step(ids, len(out), fields or {})
            ids.append(token)
            out.append(token)
            if token == self.stop:
                break
        return out

    def _step(self, ids: list[int], emitted: int, fields: dict[str, Any]) -> int:
        logits = self.logits(ids)
        bias, target = fields.get("length_bias"), fields.get("length_target")
        if bias is None and target is None:
            return int(logits.argmax())
        mode = fields.get("length_mode", "equal_to")
        left = 0 if target is None else target - emitted - 1
        if fields.get("length_strict"):
            if mode != "at_most" and left > 0:
                logits[self.stop] = -math.inf
            if mode != "at_least" and left <= 0:
                return self.stop
        p, tokens = torch.softmax(logits, -1).topk(self.candidates)
        p = p / p.sum()
        items = [(t, math.log(q)) for t, q in zip(tokens.tolist(), p.tolist(), strict=True) if q > 0]
        states = dict(zip((t for t, _ in items), self.states([[*ids, t] for t, _ in items]), strict=True))
        if self.stop in states:
            states[self.stop] = (None, [1.0])
        if bias is not None:
            return max(items, key=lambda i: i[1] + bias * self._u(states[i[0]]))[0]
        control = fields.get("length_control", "posterior")
        rule = {"posterior": self._posterior, "hard": self._hard, "soft": self._soft}[control]
        return rule(items, states, mode, left, fields)

    def _u(self, state: tuple[float | None, list[float]]) -> float:
        """1 - gamma^n from z; 0 for a stop token."""
        z = state[0]
        return 0.0 if z is None else 1 / (1 + math.exp(-z))

    def _posterior(self, items: Any, states: Any, mode: str, left: int, fields: dict[str, Any]) -> int:
        longest = self.centres[-1]
        m = min(max(left, 0), longest)
        tolerance = fields.get("length_tolerance", 0.0)

        def kernel(n: int) -> float:
            if left < 0:
                return 1.0 if mode == "at_least" else math.exp(-n / 3)
            if mode == "at_most":
                return float(n <= m)
            if mode == "at_least":
                return float(n >= m)
            return math.exp(-abs(n - m) / max(0.7, tolerance * m)) if tolerance else float(n == m)

        sharpness = fields.get("length_sharpness", 2.0 if mode == "equal_to" else 1.0)
        weights = {t: sum(p * kernel(n) for n, p in enumerate(states[t][1])) for t, _ in items}
        if max(weights.values()) <= 1e-30:
            return max(items, key=lambda i: i[1])[0]
        return max(items, key=lambda i: i[1] + sharpness * math.log(weights[i[0]] + 1e-30))[0]

    def _hard(self, items: Any, states: Any, mode: str, left: int, fields: dict[str, Any]) -> int:
        if mode == "at_least":
            if left <= 0:
                return max(items, key=lambda i: i[1])[0]
            return max(items, key=lambda i: self._u(states[i[0]]))[0]
        if mode == "at_most":
            return min(items, key=lambda i: self._u(states[i[0]]))[0]
        wanted = 1 - self.gamma ** max(left, 0)
        return min(items, key=lambda i: abs(self._u(states[i[0]]) - wanted))[0]

    def _soft(self, items: Any, states: Any, mode: str, left: int, fields: dict[str, Any]) -> int:
        wanted = 1 - self.gamma ** max(left, 0)
        u = [self._u(states[t]) for t, _ in items]
        log_p = [lp for _, lp in items]

        def tilted(beta: float) -> list[float]:
            top = max(lp + beta * x for lp, x in zip(log_p, u, strict=True))
            return [math.exp(lp + beta * x - top) for lp, x in zip(log_p, u, strict=True)]

        def mean(beta: float) -> float:
            w = tilted(beta)
            return sum(a * b for a, b in zip(w, u, strict=True)) / sum(w)

        low, high = -1e6, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) < wanted else (low, middle)
        beta = (low + high) / 2
        base = mean(0.0)
        if (mode == "at_most" and base <= wanted) or (mode == "at_least" and base >= wanted):
            beta = 0.0
        best = tilted(beta)
        return items[best.index(max(best))][0]


class LookaheadReference(Reference):
    """The same rules where a lookahead head scores the candidates, one after the other.

    Args:
        head: directory of an attached checkpoint, or of a LenVM with a lookahead head.
    """

    def __init__(self, pair: Path, head: Path, candidates: int = 16) -> None:
        self.head = head
        super().__init__(pair, candidates)

    def _load(self, pair: Path) -> None:
        if (self.head / "config.json").read_text().count('"attached"'):
            self.value: Any = AttachedHead.from_pretrained(self.head, pair / "base")
            self.backbone = self.base.model
        else:
            self.value = LengthValueModel.from_pretrained(self.head, dtype=torch.float32).eval()
            self.backbone = self.value.backbone

    @torch.no_grad()
    def states(self, sequences: list[list[int]]) -> list[tuple[float | None, list[float]]]:
        """z and P(n) of the states after the last token, from the states before it; z is that of P(n)."""
        hidden = self.backbone(torch.tensor(sequences)[:, :-1]).last_hidden_state[:, -1]
        found = []
        for state, ids in zip(hidden, sequences, strict=True):
            log_q = self.value.lookahead(state[None], torch.tensor([[ids[-1]]]))[0, 0]
            pmf = (log_q.double().exp() @ self.decode).tolist()
            rest = sum(p * self.gamma**n for n, p in enumerate(pmf))
            found.append((math.log((1 - rest) / rest), pmf))
        return found

    def predicted(self, prompt: list[int]) -> float:
        """E[L] before the first token: sum_x p(x) (1 + E[n | x])."""
        p, tokens = torch.softmax(self.logits(prompt), -1).topk(self.candidates)
        p = p / p.sum()
        return sum(
            q * (1.0 if t == self.stop else 1.0 + self.expected_length([*prompt, t]))
            for t, q in zip(tokens.tolist(), p.tolist(), strict=True)
        )
