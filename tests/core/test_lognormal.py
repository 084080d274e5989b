"""The log-normal stand-in for a length head."""

import math
from itertools import pairwise

import pytest
import torch

from lenvm.definitions import logit_from_length
from lenvm.format import LenvmConfig, Spread
from lenvm.lognormal import MIN_SIGMA, fit_spread, lognormal_log_q

GAMMA = 0.98


def cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def test_distribution_against_the_normal_cdf() -> None:
    spread = Spread(log_n_hat=(1.0, 3.0), shift=(0.1, -0.2), sigma=(0.3, 0.6))
    lenvm = LenvmConfig(gamma=GAMMA, heads=("value",), spread=spread)
    n_hat = torch.tensor([1.0, 7.0, 60.0])
    log_q, bins = lognormal_log_q(logit_from_length(n_hat, GAMMA), lenvm)
    for row, n in enumerate(n_hat.tolist()):
        x = math.log(n + 0.5)
        w = min(max((x - 1) / 2, 0), 1)
        centre, sigma = x + 0.1 + w * (-0.2 - 0.1), 0.3 + w * 0.3
        edges = [0.5, *((a + b) / 2 + 0.5 for a, b in zip(bins.centres, bins.centres[1:], strict=False)), math.inf]
        edges[-1] = bins.longest * 1e6
        mass = [cdf((math.log(b) - centre) / sigma) - cdf((math.log(a) - centre) / sigma) for a, b in pairwise(edges)]
        total = sum(mass)
        assert log_q[row].exp().tolist() == pytest.approx([m / total for m in mass], abs=1e-5)


@pytest.mark.parametrize("z", [-30.0, -8.0, 0.0, 8.0, 60.0])
def test_far_logits_stay_finite(z: float) -> None:
    log_q, _ = lognormal_log_q(torch.tensor([z]), LenvmConfig(gamma=GAMMA, heads=("value",)))
    assert log_q.isfinite().all() and log_q.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_fit_recovers_a_known_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    n_hat = torch.exp(torch.rand(20_000, generator=generator) * 3 + 2)
    noise = torch.randn(20_000, generator=generator, dtype=torch.float64) * 0.4 + 0.1
    n = torch.exp((n_hat.double() + 0.5).log() + noise) - 0.5
    spread = fit_spread(n_hat, n)
    assert len(spread.sigma) == 12
    assert spread.shift == pytest.approx([0.1] * 12, abs=0.05)
    assert spread.sigma == pytest.approx([0.4] * 12, abs=0.05)


def test_fit_with_little_or_equal_data() -> None:
    assert fit_spread(torch.tensor([3.0, 3.0]), torch.tensor([3.0, 3.0])).sigma == (MIN_SIGMA,)
    assert len(fit_spread(torch.full((500,), 4.0), torch.arange(500).float() + 1).sigma) == 1
    with pytest.raises(ValueError, match="at least 2 states"):
        fit_spread(torch.tensor([1.0]), torch.tensor([1.0]))
