"""`lookahead_scores` against float64, its independence of the batch, and planted bugs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lenvm_kernels
from lenvm.bins import LengthBins
from lenvm.format import LenvmConfig
from lenvm.guidance import Scores
from lenvm.heads import LookaheadHead
from lenvm_kernels import lookahead_scores
from lenvm_kernels.fused import lookahead as fused
from tests.kernels.checks import quick
from tests.kernels.checks.planted import load

assert quick
SOURCE = Path(lenvm_kernels.__file__).parent / "fused" / "lookahead.py"


class Case:
    """A head, states of more requests than are asked about, and candidates."""

    def __init__(
        self, rows: int, slots: int, features: int, rank: int, longest: int, gamma: float, states: torch.dtype,
        weights: torch.dtype = torch.float32, seed: int = 0,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        self.lenvm = LenvmConfig(gamma=gamma, bins=LengthBins.for_max_length(longest).centres)
        self.head = LookaheadHead(features, rank, len(self.lenvm.bins), tokens=300)
        for name, parameter in self.head.named_parameters():
            torch.nn.init.normal_(parameter, std=1.0 if name == "embedding" else 0.4, generator=g)
        self.head = self.head.to(weights)
        self.states = torch.randn(rows + 7, features, generator=g).to(states)
        self.slots = torch.randperm(rows + 7, generator=g)[:rows]
        self.token_ids = torch.randint(0, 300, (rows, slots), generator=g)

    def run(self, function=lookahead_scores, value: bool = True) -> Scores:
        with torch.no_grad():
            return function(self.states, self.slots, self.token_ids, self.head, self.lenvm, value)

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(log q, z) in float64, the expectation of gamma^n taken length by length."""
        head = {name: p.detach().double() for name, p in self.head.named_parameters()}
        state = self.states[self.slots].double() @ head["w1"].T + head["b1"]
        inner = torch.nn.functional.silu(state[:, None] + head["embedding"][self.token_ids])
        log_q = (inner @ head["w2"].T + head["b2"]).log_softmax(-1)
        matrix = LengthBins(self.lenvm.bins).decode_matrix().double()  # [B, N + 1]
        n = torch.arange(matrix.shape[1], dtype=torch.float64)
        u = 1.0 - log_q.exp() @ matrix @ torch.tensor(self.lenvm.gamma, dtype=torch.float64) ** n
        return log_q, u.log() - (1.0 - u).log()

    def wrong(self, scores: Scores) -> bool:
        log_q, z = self.truth()
        assert scores.length_log_q is not None
        near = torch.allclose(scores.length_log_q.double(), log_q, rtol=1e-5, atol=5e-5)
        return not (near and torch.allclose(scores.z.double(), z, rtol=1e-4, atol=1e-4))


CASES = [
    (1, 1, 16, 8, 40, 0.9, torch.float32),
    (5, 16, 100, 48, 300, 0.98, torch.float32),
    (33, 9, 64, 130, 4000, 0.9999, torch.float32),
    (3, 40, 72, 70, 600, 0.997, torch.bfloat16),
    (2, 17, 40, 33, 90, 0.95, torch.float16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"R{case[0]} K{case[1]} H{case[2]} r{case[3]}")
def test_against_float64(case: tuple) -> None:
    given = Case(*case)
    scores = given.run()
    assert scores.z.dtype == scores.length_log_q.dtype == torch.float32
    assert not given.wrong(scores)


def test_half_precision_weights() -> None:
    given = Case(4, 16, 64, 48, 300, 0.98, torch.bfloat16, torch.bfloat16)
    assert not given.wrong(given.run())


def test_without_the_value_z_is_zero_and_the_distribution_the_same() -> None:
    given = Case(*CASES[1])
    with_, without = given.run(), given.run(value=False)
    assert torch.equal(with_.length_log_q, without.length_log_q)
    assert (without.z == 0).all()


def test_a_row_does_not_depend_on_its_batch() -> None:
    given = Case(*CASES[2])
    whole = given.run()
    given.slots, given.token_ids = given.slots[20:22], given.token_ids[20:22]
    part = given.run()
    assert torch.equal(part.z, whole.z[20:22])
    assert torch.equal(part.length_log_q, whole.length_log_q[20:22])


def test_nothing_to_do_and_gradients_take_the_reference() -> None:
    given = Case(*CASES[0])
    empty = lookahead_scores(given.states, given.slots[:0], given.token_ids[:0], given.head, given.lenvm)
    assert empty.z.shape == (0, 1)
    scores = lookahead_scores(given.states, given.slots, given.token_ids, given.head, given.lenvm)
    scores.z.sum().backward()
    assert given.head.w1.grad is not None


MUTANTS = {
    "state of another row": ("STATES, slot * states_row", "STATES, rows * states_row"),
    "no bias of the state": (
        "inner += tl.load(B1 + units, mask=in_units, other=0.0)",
        "inner += 0.0 * tl.load(B1 + units, mask=in_units, other=0.0)",
    ),
    "no token": ("x = state[None, :] + e.to(tl.float32)", "x = state[None, :] + 0.0 * e.to(tl.float32)"),
    "sigmoid for SiLU": ("tl.dot(x / (1.0", "tl.dot(1.0 / (1.0"),
    "no bias of the bins": ("logits += tl.load(B2", "logits += 0.0 * tl.load(B2"),
    "bins not masked": ("tl.where(in_bins[None, :], logits, NEG_INF)", "tl.where(in_bins[None, :], logits, 0.0)"),
    "not normalised": ("log_q - tl.log(tl.sum(tl.exp(log_q), 1))[:, None]", "log_q - 0.0 * tl.sum(log_q, 1)[:, None]"),
    "sign of z": ("tl.log(1.0 - discount) - tl.log(discount)", "tl.log(discount) - tl.log(1.0 - discount)"),
}


def test_the_kernel_itself_passes(tmp_path: Path) -> None:
    given = Case(*CASES[1])
    module = load("sound_lookahead", SOURCE.read_text(), tmp_path)
    assert not given.wrong(given.run(module.lookahead_scores))
    assert fused.BLOCK_K < 40 and fused.BLOCK_R < 130 and fused.BLOCK_M < 33, "the cases cover several blocks"


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    old, new = MUTANTS[name]
    text = SOURCE.read_text()
    assert text.count(old) == 1, f"the kernel changed: {old!r} occurs {text.count(old)} times"
    given = Case(*CASES[1])
    label = "ahead_" + "".join(c if c.isalnum() else "_" for c in name)
    assert given.wrong(given.run(load(label, text.replace(old, new), tmp_path).lookahead_scores))
