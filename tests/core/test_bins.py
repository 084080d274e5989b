"""Bins, two-hot code and the statistics read from a length distribution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lenvm.bins import LengthBins

sizes = st.integers(2, 700)


@given(sizes)
def test_two_hot_keeps_the_length(longest: int) -> None:
    bins = LengthBins.for_max_length(longest)
    n = torch.arange(1, longest + 1)
    code = bins.targets(n)
    assert torch.allclose(code.sum(-1), torch.ones(longest))
    assert torch.allclose((code.double() @ bins.centre_tensor), n.double(), rtol=1e-6)
    assert ((code > 0).sum(-1) <= 2).all()


@given(sizes)
def test_decode_matrix_is_the_normalised_two_hot(longest: int) -> None:
    bins = LengthBins.for_max_length(longest)
    dec = bins.decode_matrix()
    assert dec.shape == (len(bins), longest + 1)
    assert torch.allclose(dec.sum(-1), torch.ones(len(bins)))
    assert (dec[:, 0] == 0).all()
    code = bins.targets(torch.arange(1, longest + 1))
    assert torch.allclose(dec[:, 1:], (code / code.sum(0)).T, atol=1e-6)


def test_size_of_the_bins() -> None:
    """About 104 bins to 32k tokens; 1..12 exact."""
    bins = LengthBins.for_max_length(32768)
    assert bins.centres[:12] == tuple(range(1, 13))
    assert 95 <= len(bins) <= 110
    assert bins.longest == 32768
    assert LengthBins.for_max_length(2).centres == (1, 2)


def test_lengths_beyond_the_ends_are_clamped() -> None:
    bins = LengthBins.for_max_length(50)
    assert bins.targets(torch.tensor([0, 51, 9999])).argmax(-1).tolist() == [0, len(bins) - 1, len(bins) - 1]


@given(st.integers(0, 10_000))
def test_statistics_against_the_pmf(seed: int) -> None:
    bins = LengthBins.for_max_length(90)
    logits = torch.randn(len(bins), generator=torch.Generator().manual_seed(seed)) * 3
    log_q = logits.log_softmax(-1)
    pmf = bins.pmf(log_q).double()
    n = torch.arange(91).double()
    assert pmf.sum().item() == pytest.approx(1, abs=1e-5)
    assert bins.expected(log_q).item() == pytest.approx((pmf * n).sum().item(), rel=1e-4)
    for p in (0.1, 0.5, 0.9):
        k = bins.quantile(log_q, p).item()
        assert pmf[: k + 1].sum() >= p - 2e-6
        assert k == 0 or pmf[:k].sum() < p
    for k in (1, 2, 13, 40, 90):
        assert bins.log_survival(log_q, torch.tensor(k)).exp().item() == pytest.approx(pmf[k:].sum().item(), abs=1e-5)


def test_survival_at_the_ends() -> None:
    bins = LengthBins.for_max_length(30)
    log_q = torch.zeros(len(bins)).log_softmax(-1)
    assert bins.log_survival(log_q, torch.tensor([0, 1])).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert bins.log_survival(log_q, torch.tensor(500)).isfinite()


def test_survival_gradient_is_finite_when_bins_cannot_reach() -> None:
    bins = LengthBins.for_max_length(30)
    logits = torch.randn(4, len(bins), requires_grad=True)
    bins.log_survival(logits.log_softmax(-1), torch.tensor([1, 5, 30, 31])).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("centres", [(1,), (2, 3), (1, 1), (1, 3, 2), (1, 2.5)])
def test_wrong_centres_are_refused(centres: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="bin centres must be"):
        LengthBins(centres)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        LengthBins.for_max_length(1)
