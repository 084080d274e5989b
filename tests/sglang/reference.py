"""The guidance rules once more, on transformers alone: whole sequences, no KV cache, rules in plain Python.

Nothing of `lenvm.guidance`, `lenvm.candidates` or `lenvm.sampler` is used here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from lenvm.attached import AttachedHead
from lenvm.lognormal import lognormal_bins
from lenvm.modeling import LengthValueModel
from tests.sglang.models import THINK_END

MASK = 2**64 - 1


def mix(x: int) -> int:
    """SplitMix64."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@dataclass(frozen=True)
class Sampling:
    """How a request is drawn: its seed and the host's filters."""

    seed: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0

    def gumbel(self, position: int, token: int) -> float:
        """Noise keyed by seed, position and token."""
        key = int.from_bytes(hashlib.blake2b(f"{self.seed}/0".encode(), digest_size=8).digest(), "little")
        uniform = ((mix(mix(mix(key) ^ position) ^ token) >> 11) + 0.5) / 2**53
        return -math.log(-math.log(uniform))

    def filtered(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities after temperature, top-k, top-p and min-p; zeros elsewhere."""
        p = torch.softmax(logits / self.temperature, -1)
        ranked = sorted(range(len(p)), key=lambda t: (-float(p[t]), t))
        ranked = ranked[: self.top_k] if self.top_k > 0 else ranked
        mass, before, kept = sum(float(p[t]) for t in ranked) if self.top_k > 0 else 1.0, 0.0, []
        for t in ranked:
            if before <= self.top_p * mass and p[t] >= self.min_p * p[ranked[0]]:
                kept.append(t)
            before += float(p[t])
        out = torch.zeros_like(p)
        out[kept] = p[kept]
        return out


Adjust = Callable[[torch.Tensor, list[int]], None]


class Reference:
    """A base model and a length value model, both of transformers, in float32."""

    def __init__(self, pair: Path, candidates: int = 16, base: Path | None = None) -> None:
        self.candidates = candidates
        self._load_base(base or pair / "base")
        self._load(pair)
        self.gamma = self.value.lenvm.gamma
        self.spread = self.value.lenvm.spread
        self.centres = self.value.lenvm.bins or lognormal_bins(self.gamma).centres
        self.decode = torch.tensor(self._decode_table(), dtype=torch.float64)

    def _load_base(self, base: Path) -> None:
        self.base = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.stop = self.base.config.eos_token_id

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

    def value_of(self, sequences: list[list[int]]) -> Any:
        """The value model's output for sequences of one length."""
        return self.value(torch.tensor(sequences))

    @torch.no_grad()
    def states(self, sequences: list[list[int]]) -> list[tuple[float | None, list[float]]]:
        """z and P(n), n = 0..N, of the states after sequences of one length."""
        out = self.value_of(sequences)
        z = out.z[:, -1].tolist()
        if out.length_logits is None:
            q = torch.tensor([self._lognormal(x) for x in z], dtype=torch.float64)
        else:
            q = torch.softmax(out.length_logits[:, -1].double(), -1)
        return list(zip(z, (q @ self.decode).tolist(), strict=True))

    def inverted(self, z: float) -> float:
        """n_hat = softplus(z) / |ln gamma|."""
        return math.log1p(math.exp(z)) / -math.log(self.gamma)

    def _lognormal(self, z: float) -> list[float]:
        """q over the bins: ln(n + 1/2) is normal, with a centre and a spread that depend on n_hat."""
        x = math.log(self.inverted(z) + 0.5)
        (a, b), shift, sigma = self.spread.log_n_hat, self.spread.shift, self.spread.sigma
        w = min(max((x - a) / (b - a), 0.0), 1.0)
        centre, width = x + shift[0] + w * (shift[1] - shift[0]), sigma[0] + w * (sigma[1] - sigma[0])
        edges = [0.5, *((left + right + 1) / 2 for left, right in pairwise(self.centres)), math.inf]

        def mass(low: float, high: float) -> float:
            low, high = ((math.log(e) - centre) / width / math.sqrt(2) for e in (low, high))
            if low > 0:
                return math.erfc(low) - math.erfc(high)
            return math.erfc(-high) - math.erfc(-low)

        masses = [mass(low, high) for low, high in pairwise(edges)]
        return [m / sum(masses) for m in masses]

    def expected_length(self, ids: list[int]) -> float:
        """E[n] of the state after `ids`; without a length distribution the inverted value."""
        z, pmf = self.states([ids])[0]
        if not self.value.lenvm.bins:
            return self.inverted(z)
        return sum(n * p for n, p in enumerate(pmf))

    def greedy(
        self, prompt: list[int], limit: int, fields: dict[str, Any] | None, adjust: Adjust | None = None
    ) -> list[int]:
        """Tokens of a greedy answer under a request's length fields; None is the base model alone.

        `adjust` does to the logits what the request's penalties and biases do, given the tokens emitted so far.
        """
        out: list[int] = []
        while len(out) < limit:
            logits = self.logits(prompt + out)
            if adjust is not None:
                adjust(logits, out)
            token = self._scoped(logits, prompt, out, fields or {})
            out.append(token)
            if token == self.stop:
                break
        return out

    def sample(self, prompt: list[int], limit: int, fields: dict[str, Any], sampling: Sampling) -> list[int]:
        """Tokens of a guided answer that is drawn."""
        out: list[int] = []
        while len(out) < limit and self.stop not in out:
            out.append(self._step(self.logits(prompt + out), prompt + out, len(out), fields, sampling=sampling))
        return out

    def _scoped(self, logits: torch.Tensor, prompt: list[int], out: list[int], fields: dict[str, Any]) -> int:
        """One step of a completion whose thinking is open at the prompt's end."""
        ids, scope = prompt + out, fields.get("length_scope", "all")
        thought = out.index(THINK_END) + 1 if THINK_END in out else None
        if scope == "all":
            return self._step(logits, ids, len(out), fields)
        if scope == "answer":
            if thought is None or len(out) <= thought:  # the first token of the answer is the base model's
                return int(logits.argmax())
            return self._step(logits, ids, len(out) - thought, fields)
        left = fields["length_target"] - len(out) - 1
        if thought is not None or (fields.get("length_mode") == "at_least" and left <= 0):
            return int(logits.argmax())
        answer = round(self.expected_length([*ids, THINK_END]))
        moved = {**fields, "length_target": max(left, 0) + answer + len(out) + 1}
        return self._step(logits, ids, len(out), moved, probe=THINK_END)

    def _step(
        self,
        logits: torch.Tensor,
        ids: list[int],
        emitted: int,
        fields: dict[str, Any],
        probe: int | None = None,
        sampling: Sampling | None = None,
    ) -> int:
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
        p, tokens = (sampling.filtered(logits) if sampling else torch.softmax(logits, -1)).topk(self.candidates)
        if probe is not None and probe not in tokens:
            p, tokens = p[:-1], tokens[:-1]  # its slot is needed for the probe
        p = p / p.sum()
        items = [(t, math.log(q)) for t, q in zip(tokens.tolist(), p.tolist(), strict=True) if q > 0]
        states = dict(zip((t for t, _ in items), self.states([[*ids, t] for t, _ in items]), strict=True))
        if self.stop in states:
            states[self.stop] = (None, [1.0])
        if bias is not None:
            scores = [lp + bias * self._u(states[t]) for t, lp in items]
        else:
            control = fields.get("length_control", "posterior")
            rule = {"posterior": self._posterior, "hard": self._hard, "soft": self._soft}[control]
            scores = rule(items, states, mode, left, fields)
        if sampling is not None:
            scores = [s + sampling.gumbel(emitted, t) for s, (t, _) in zip(scores, items, strict=True)]
        return items[scores.index(max(scores))][0]

    def _u(self, state: tuple[float | None, list[float]]) -> float:
        """1 - gamma^n from z; 0 for a stop token."""
        z = state[0]
        return 0.0 if z is None else 1 / (1 + math.exp(-z))

    def _posterior(self, items: Any, states: Any, mode: str, left: int, fields: dict[str, Any]) -> list[float]:
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
            return [lp for _, lp in items]
        return [lp + sharpness * math.log(weights[t] + 1e-30) for t, lp in items]

    def _hard(self, items: Any, states: Any, mode: str, left: int, fields: dict[str, Any]) -> list[float]:
        if mode == "at_least" and left <= 0:
            return [lp for _, lp in items]
        wanted = {"at_least": 1.0, "at_most": 0.0, "equal_to": 1 - self.gamma ** max(left, 0)}[mode]
        distance = [abs(self._u(states[t]) - wanted) for t, _ in items]
        best = distance.index(min(distance))
        return [0.0 if i == best else -math.inf for i in range(len(items))]

    def _soft(self, items: Any, states: Any, mode: str, left: int, fields: dict[str, Any]) -> list[float]:
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
        return [math.log(w) if w > 0 else -math.inf for w in tilted(beta)]


class LookaheadReference(Reference):
    """The same rules where a lookahead head scores the candidates.

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
        """z and P(n) of the states after the last token, from the one state before it; z is that of P(n)."""
        (prefix,) = {tuple(ids[:-1]) for ids in sequences}
        state = self.backbone(torch.tensor([prefix])).last_hidden_state[0, -1]
        log_q = self.value.lookahead(state[None], torch.tensor([[ids[-1] for ids in sequences]]))[0]
        found = []
        for pmf in (log_q.double().exp() @ self.decode).tolist():
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


class VisionReference(Reference):
    """The same rules where base model and value model read images, each with its own tower, in whole sequences."""

    def _load_base(self, base: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(base)
        self.base = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
        self.stop = self.processor.tokenizer.eos_token_id
        self.seen: dict[str, torch.Tensor] = {}

    def read(self, text: str, images: list[Any]) -> list[int]:
        """Token ids of a prompt; its images are those that every sequence from now on begins with."""
        inputs = self.processor(text=[text], images=images or None, return_tensors="pt")
        self.seen = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
        return inputs["input_ids"][0].tolist()

    def _inputs(self, sequences: list[list[int]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor(sequences)
        images = {name: x.repeat(len(sequences), *[1] * (x.dim() - 1)) for name, x in self.seen.items()}
        marks = (ids == self.base.config.image_token_id).long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": marks, **images}

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """[V] of the next token."""
        return self.base(**self._inputs([ids])).logits[0, -1].double()

    def value_of(self, sequences: list[list[int]]) -> Any:
        """The value model's output for sequences of one length."""
        return self.value(**self._inputs(sequences))
