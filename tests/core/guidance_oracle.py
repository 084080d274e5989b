"""The guidance rules written out one row and one candidate at a time, in Python floats: what the tensors must equal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lenvm.bins import LengthBins


@dataclass
class Candidate:
    token_id: int
    p: float
    stop: bool
    z: float
    q: list[float]  # probabilities of the bins


@dataclass
class Ask:
    mode: str
    control: str
    target: int
    emitted: int
    sharpness: float = 1.0
    tolerance: float = 0.0
    bias: float = 0.0


def bin_pmf(bins: LengthBins) -> list[list[float]]:
    """P(n | bin), from the two-hot definition alone."""
    centres = bins.centres
    weights = [[0.0] * (bins.longest + 1) for _ in centres]
    for n in range(1, bins.longest + 1):
        for i, c in enumerate(centres):
            if n == c:
                weights[i][n] = 1.0
            elif i and centres[i - 1] < n < c:
                weights[i][n] = (n - centres[i - 1]) / (c - centres[i - 1])
                weights[i - 1][n] = (c - n) / (c - centres[i - 1])
    return [[w / sum(row) for w in row] for row in weights]


def kernel(ask: Ask, n: int, longest: int) -> float:
    m = ask.target - ask.emitted - 1
    if m < 0:
        return 1.0 if ask.mode == "at_least" else math.exp(-n / 3)
    m = min(m, longest)
    if ask.mode == "at_most":
        return float(n <= m)
    if ask.mode == "at_least":
        return float(n >= m)
    if ask.tolerance > 0:
        return math.exp(-abs(n - m) / max(0.7, ask.tolerance * m))
    return float(n == m)


def normalise(weights: list[float]) -> list[float]:
    total = sum(weights)
    return [w / total for w in weights]


def posterior(candidates: list[Candidate], ask: Ask, bins: LengthBins, pmf: list[list[float]]) -> list[float]:
    weights = []
    for c in candidates:
        if c.stop:
            weights.append(kernel(ask, 0, bins.longest))
        else:
            weights.append(
                sum(
                    q * sum(pmf[b][n] * kernel(ask, n, bins.longest) for n in range(bins.longest + 1))
                    for b, q in enumerate(c.q)
                )
            )
    if max(weights) <= 1e-30:
        return normalise([c.p for c in candidates])
    # in logarithms: sharp exponents underflow
    logs = [math.log(c.p) + ask.sharpness * math.log(w + 1e-30) for c, w in zip(candidates, weights, strict=True)]
    top = max(logs)
    return normalise([math.exp(x - top) for x in logs])


def u(c: Candidate) -> float:
    return 0.0 if c.stop else 1 / (1 + math.exp(-c.z))


def hard(candidates: list[Candidate], ask: Ask, gamma: float) -> list[float]:
    m = ask.target - ask.emitted - 1
    if ask.mode == "at_least" and m <= 0:
        return normalise([c.p for c in candidates])
    if ask.mode == "at_most":
        cost = [u(c) for c in candidates]
    elif ask.mode == "at_least":
        cost = [-u(c) for c in candidates]
    else:
        cost = [abs(u(c) - (1 - gamma ** max(m, 0))) for c in candidates]
    best = min(range(len(candidates)), key=lambda i: (cost[i], -candidates[i].p, candidates[i].token_id))
    return [float(i == best) for i in range(len(candidates))]


def soft(candidates: list[Candidate], ask: Ask, gamma: float) -> list[float]:
    wanted = 1 - gamma ** max(ask.target - ask.emitted - 1, 0)
    us = [u(c) for c in candidates]

    def tilt(beta: float) -> list[float]:
        logs = [math.log(c.p) + beta * x for c, x in zip(candidates, us, strict=True)]
        top = max(logs)
        return normalise([math.exp(v - top) for v in logs])

    def mean(beta: float) -> float:
        return sum(p * x for p, x in zip(tilt(beta), us, strict=True))

    if (ask.mode == "at_most" and mean(0) <= wanted) or (ask.mode == "at_least" and mean(0) >= wanted):
        return tilt(0)
    low, high = -1e6, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < wanted else (low, middle)
    return tilt((low + high) / 2)


def bias(candidates: list[Candidate], ask: Ask) -> list[float]:
    logs = [math.log(c.p) + ask.bias * u(c) for c in candidates]
    top = max(logs)
    return normalise([math.exp(x - top) for x in logs])
