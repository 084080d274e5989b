"""What must hold of any batch, from hypothesis."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lenvm.guidance import Control
from lenvm_kernels import TiltSample, tilt_sample
from tests.kernels.checks import quick, rows

assert quick
SEEDS = st.integers(0, 10**6)


def same(a: TiltSample, b: TiltSample) -> bool:
    return all(
        torch.equal(torch.nan_to_num(x.double()), torch.nan_to_num(y.double())) for x, y in zip(a, b, strict=True)
    )


@settings(max_examples=4)
@given(SEEDS)
def test_rows_do_not_see_each_other(seed: int) -> None:
    """Shuffled, and split into batches of other sizes: the same to the last bit."""
    batch = rows.mixed(rows.MODELS[seed % 2], 7, slots=5, seed=seed)
    whole = batch.run(tilt_sample)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    shuffled = batch.select(order).run(tilt_sample)
    assert same(TiltSample(*(t[order] for t in whole)), shuffled)
    parts = [batch.select(torch.arange(a, b)).run(tilt_sample) for a, b in ((0, 1), (1, 3), (3, 7))]
    assert same(whole, TiltSample(*(torch.cat(t) for t in zip(*parts, strict=True))))


@settings(max_examples=5)
@given(SEEDS)
def test_order_of_the_candidates_does_not_matter(seed: int) -> None:
    batch = rows.mixed(rows.MODELS[seed % 2], 6, slots=6, seed=seed)
    slots = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    a, b = batch.run(tilt_sample), batch.reorder(slots).run(tilt_sample)
    assert torch.equal(a.token_id, b.token_id)
    assert torch.allclose(a.log_p.gather(1, slots).exp(), b.log_p.exp(), atol=1e-6)


@settings(max_examples=4)
@given(SEEDS)
def test_zero_bias_is_the_base(seed: int) -> None:
    batch = rows.mixed(rows.MODELS[0], 6, slots=6, seed=seed)
    batch.guidance.bias.zero_()
    batch.guidance.control.fill_(int(Control.NONE))
    plain = batch.run(tilt_sample)
    batch.guidance.control.fill_(int(Control.BIAS))
    tilted = batch.run(tilt_sample)
    assert torch.equal(plain.log_p.view(torch.int32), batch.candidates.log_p.view(torch.int32))
    assert torch.allclose(tilted.log_p.exp(), plain.log_p.exp(), atol=1e-6)
    assert torch.equal(tilted.token_id, plain.token_id)
    assert tilted.kl.max() < 1e-6 and plain.kl.max() == 0


@settings(max_examples=4)
@given(SEEDS)
def test_length_grows_with_bias_and_kl_is_not_negative(seed: int) -> None:
    one = rows.mixed(rows.MODELS[1], 1, slots=8, seed=seed)
    batch = one.select(torch.zeros(7, dtype=torch.int64))
    batch.guidance.control.fill_(int(Control.BIAS))
    batch.guidance.bias.copy_(torch.tensor([-1e5, -20.0, -1.0, 0.0, 1.0, 30.0, 1e5]))
    got = batch.run(tilt_sample)
    assert (got.expected_value.diff() <= 1e-6).all()  # V falls as lengths grow
    assert (got.kl >= 0).all()


@settings(max_examples=4)
@given(SEEDS)
def test_kl_of_mixed_rows_is_not_negative(seed: int) -> None:
    got = rows.mixed(rows.MODELS[seed % 2], 8, slots=6, seed=seed).run(tilt_sample)
    assert (got.kl >= 0).all()
    assert ((got.value <= 0) & (got.value >= -1)).all()
