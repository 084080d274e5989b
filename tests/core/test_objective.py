"""The losses against Eq. 9 and the cross-entropy written out in float64."""

import math

import pytest
import torch

from lenvm.bins import LengthBins
from lenvm.objective import length_nll_sum, value_loss_sum

BINS = LengthBins.for_max_length(60)


def states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, generator=generator) * 3
    remaining = torch.randint(1, 61, (200,), generator=generator)
    censored = torch.rand(200, generator=generator) < 0.3
    return z, remaining, censored


def test_value_loss_is_equation_9_with_one_sided_censoring() -> None:
    z, remaining, censored = states()
    gamma, expected = 0.97, 0.0
    for a, n, cut in zip(z.double().tolist(), remaining.tolist(), censored.tolist(), strict=True):
        value, target = -1 / (1 + math.exp(-a)), -(1 - gamma**n)
        if not cut or value > target:  # a cut completion is at least this long: V must not be above its return
            expected += (value - target) ** 2
    assert value_loss_sum(z, remaining, censored, gamma).item() == pytest.approx(expected, rel=1e-5)


def test_length_loss_is_two_hot_cross_entropy_with_survival() -> None:
    _, remaining, censored = states()
    logits = torch.randn(200, len(BINS), generator=torch.Generator().manual_seed(1)) * 2
    q = logits.double().softmax(-1)
    dec = BINS.decode_matrix().double()
    code = BINS.targets(remaining).double()
    expected = 0.0
    for i, (n, cut) in enumerate(zip(remaining.tolist(), censored.tolist(), strict=True)):
        expected -= math.log((q[i] @ dec[:, n:].sum(-1)).item()) if cut else (code[i] @ q[i].log()).item()
    assert length_nll_sum(logits, remaining, censored, BINS).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_are_finite_at_extreme_logits() -> None:
    z = torch.tensor([-80.0, 80.0, 0.0], requires_grad=True)
    logits = torch.full((3, len(BINS)), -60.0)
    logits[:, 0] = 60.0
    logits.requires_grad_()
    remaining, censored = torch.tensor([60, 1, 30]), torch.tensor([False, False, True])
    (value_loss_sum(z, remaining, censored, 0.999) + length_nll_sum(logits, remaining, censored, BINS)).backward()
    assert z.grad is not None and z.grad.isfinite().all()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_a_censored_state_never_pulls_towards_shorter() -> None:
    z = torch.tensor([5.0, -5.0], requires_grad=True)
    value_loss_sum(z, torch.tensor([3, 3]), torch.tensor([True, True]), 0.97).backward()
    assert z.grad is not None
    assert z.grad[0] == 0  # already predicts longer than what was seen
    assert z.grad[1] < 0  # gradient descent raises z: longer
