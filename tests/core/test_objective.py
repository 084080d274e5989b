"""The losses against Eq. 9 and the cross-entropy written out in float64."""

import math

import pytest
import torch

from lenvm.bins import LengthBins
from lenvm.objective import Objective, length_nlls, value_losses
from lenvm.targets import ValueSpace

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
    found = value_losses(z, remaining, censored, ValueSpace(gamma))
    assert found.sum().item() == pytest.approx(expected, rel=1e-5)


def test_length_loss_is_two_hot_cross_entropy_with_survival() -> None:
    _, remaining, censored = states()
    logits = torch.randn(200, len(BINS), generator=torch.Generator().manual_seed(1)) * 2
    q = logits.double().softmax(-1)
    dec = BINS.decode_matrix().double()
    code = BINS.targets(remaining).double()
    expected = 0.0
    for i, (n, cut) in enumerate(zip(remaining.tolist(), censored.tolist(), strict=True)):
        expected -= math.log((q[i] @ dec[:, n:].sum(-1)).item()) if cut else (code[i] @ q[i].log()).item()
    assert length_nlls(logits, remaining, censored, BINS).sum().item() == pytest.approx(expected, rel=1e-5)


def test_gradients_are_finite_at_extreme_logits() -> None:
    z = torch.tensor([-80.0, 80.0, 0.0], requires_grad=True)
    logits = torch.full((3, len(BINS)), -60.0)
    logits[:, 0] = 60.0
    logits.requires_grad_()
    remaining, censored = torch.tensor([60, 1, 30]), torch.tensor([False, False, True])
    value = value_losses(z, remaining, censored, ValueSpace(0.999))
    (value + length_nlls(logits, remaining, censored, BINS)).sum().backward()
    assert z.grad is not None and z.grad.isfinite().all()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_a_censored_state_never_pulls_towards_shorter() -> None:
    z = torch.tensor([5.0, -5.0], requires_grad=True)
    value_losses(z, torch.tensor([3, 3]), torch.tensor([True, True]), ValueSpace(0.97)).sum().backward()
    assert z.grad is not None
    assert z.grad[0] == 0  # already predicts longer than what was seen
    assert z.grad[1] < 0  # gradient descent raises z: longer


REPRESENTED = {
    "return": (lambda z: 1 / (1 + math.exp(-z)), lambda n: 1 - 0.97**n),
    "length": (lambda z: math.log1p(math.exp(z)), lambda n: n),
    "normalized_length": (lambda z: 1 / (1 + math.exp(-z)), lambda n: min(n, 40) / 40),
    "log_length": (lambda z: math.log1p(math.exp(z)), lambda n: math.log(1 + n)),
}
SPACES = {
    name: ValueSpace(0.97, name, 40 if name == "normalized_length" else None)  # type: ignore[arg-type]
    for name in REPRESENTED
}


def grid() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Five rows as the collator lays them: prompt, target states, padding; two censored, two cut at the cutoff."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(5, 30, generator=generator) * 2
    labels = torch.full((5, 30), -100)
    for row, (first, states, total) in enumerate([(4, 20, 20), (0, 30, 55), (9, 1, 1), (2, 7, 7), (6, 24, 33)]):
        labels[row, first : first + states] = torch.arange(total, total - states, -1)
    mask = labels != -100
    censored = mask & torch.tensor([False, False, False, True, True])[:, None]
    return z, labels, mask, censored


@pytest.mark.parametrize("representation", REPRESENTED)
@pytest.mark.parametrize("weighting", ["token", "trajectory"])
@pytest.mark.parametrize("huber", [None, 0.3])
def test_every_objective_against_a_loop(representation: str, weighting: str, huber: float | None) -> None:
    """Eq. 36 with the weights of Eq. 39 and 43, each representation, squared error and Huber, in plain floats."""
    z, labels, mask, censored = grid()
    logits = torch.randn(5, 30, len(BINS), generator=torch.Generator().manual_seed(4))
    nll = length_nlls(logits.flatten(0, 1), labels.flatten(), censored.flatten(), BINS).view(5, 30).tolist()
    f, g = REPRESENTED[representation]
    value = length = total = 0.0
    for b in range(5):
        states = [t for t in range(30) if mask[b, t]]
        for t in states:
            weight = 1.0 if weighting == "token" else 1.0 / len(states)
            error = g(int(labels[b, t])) - f(z[b, t].item())
            error = max(error, 0.0) if censored[b, t] else error
            small = huber is None or abs(error) <= huber
            value += weight * (error**2 if small else 2 * huber * abs(error) - huber**2)  # type: ignore[operator]
            length += weight * nll[b][t]
            total += weight
    objective = Objective(SPACES[representation], BINS, weighting=weighting, huber=huber)  # type: ignore[arg-type]
    found = objective.sums(z, logits, labels, mask, censored)
    assert [x.item() for x in found] == pytest.approx([value, length], rel=1e-5)
    assert int(objective.counted(mask).sum()) == pytest.approx(total, rel=1e-9)
    assert objective.sums(z, None, labels, mask, censored)[1].item() == 0.0


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_bootstrapped_loss_against_a_loop(lam: float, bootstrap: bool) -> None:
    """(V - G)^2 with GAE's targets V + A, A_t = delta_t + gamma lambda A_{t+1}, constants to the gradient."""
    z, labels, mask, censored = grid()
    z.requires_grad_()
    value, _ = Objective(SPACES["return"], lam=lam, bootstrap=bootstrap).sums(z, None, labels, mask, censored)
    value.backward()
    wanted, slope = 0.0, torch.zeros(5, 30)
    for b in range(5):
        states = [t for t in range(30) if mask[b, t]]
        v = {t: -1 / (1 + math.exp(-z[b, t].item())) for t in states}
        closed = {t: -(1 - 0.97 ** int(labels[b, t])) for t in states}
        cut = bool(censored[b].any())
        target = {}
        advantage = 0.0
        for t in reversed(states):
            if t == states[-1]:  # what is known of the rest: the return, or for a cut completion at most that
                advantage = (min(v[t], closed[t]) if cut else closed[t]) - v[t]
            else:
                advantage = -0.03 + 0.97 * v[t + 1] - v[t] + 0.97 * lam * advantage
            target[t] = v[t] + advantage if bootstrap or not cut else min(v[t], closed[t])
        for t in states:
            wanted += (v[t] - target[t]) ** 2
            slope[b, t] = 2 * (v[t] - target[t]) * v[t] * (1 + v[t])
    assert value.item() == pytest.approx(wanted, rel=1e-5)
    assert z.grad is not None
    assert torch.allclose(z.grad, slope, atol=1e-6)


def test_lambda_one_is_the_closed_form() -> None:
    z, labels, mask, _ = grid()
    finished = torch.zeros_like(mask)
    recursion = Objective(SPACES["return"], bootstrap=True).sums(z, None, labels, mask, finished)[0]
    closed = Objective(SPACES["return"]).sums(z, None, labels, mask, finished)[0]
    assert recursion.item() == pytest.approx(closed.item(), rel=1e-5)


def test_objectives_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="bootstrapped targets need the discounted return, got 'length'"):
        Objective(SPACES["length"], lam=0.9)
    with pytest.raises(ValueError, match=r"lambda must be between 0 and 1, got 1\.5"):
        Objective(SPACES["return"], lam=1.5)
    with pytest.raises(ValueError, match="threshold of Huber's loss must be positive, got 0"):
        Objective(SPACES["return"], huber=0)
    with pytest.raises(ValueError, match="weighting must be one of token, trajectory, got 'row'"):
        Objective(SPACES["return"], weighting="row")  # type: ignore[arg-type]
