"""Appendix C against loops over tokens."""

from __future__ import annotations

import pytest
import torch

from lenvm.definitions import discounted_return
from lenvm.rl import advantages, combine, length_advantages, length_rewards, state_values, td_errors, whiten

GAMMA, LAM = 0.97, 0.9


def batch(seed: int = 0, left: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Values, mask, last values and lengths of five rows of up to 13 tokens; rows 1 and 3 were cut."""
    torch.manual_seed(seed)
    lengths = [13, 1, 7, 4, 10]
    mask = torch.stack([torch.arange(13) < n for n in lengths])
    if left:
        mask = mask.flip(1)
    last = torch.tensor([0.0, -0.5, 0.0, -0.3, 0.0], dtype=torch.float64)
    return -torch.rand(5, 13, dtype=torch.float64), mask, last, lengths


def loop(values: torch.Tensor, mask: torch.Tensor, last: torch.Tensor, lam: float) -> torch.Tensor:
    """Eq. 23 and 24, token by token."""
    out = torch.zeros_like(values)
    for b in range(values.shape[0]):
        columns = mask[b].nonzero()[:, 0].tolist()
        deltas = []
        for i, t in enumerate(columns):
            after = values[b, columns[i + 1]] if i + 1 < len(columns) else last[b]
            deltas.append(-(1 - GAMMA) + GAMMA * after - values[b, t])
        for i, t in enumerate(columns):
            out[b, t] = sum((GAMMA * lam) ** k * deltas[i + k] for k in range(len(columns) - i))
    return out


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("lam", [0.0, LAM, 1.0])
def test_advantages_are_those_of_the_loop(lam: float, left: bool) -> None:
    values, mask, last, _ = batch(left=left)
    found = length_advantages(values, mask, GAMMA, lam, last)
    torch.testing.assert_close(found, loop(values, mask, last, lam), rtol=1e-6, atol=1e-7)
    assert (found[~mask] == 0).all()


def test_with_lambda_one_the_advantage_is_return_minus_value() -> None:
    values, mask, _, lengths = batch()
    found = length_advantages(values, mask, GAMMA, 1.0)
    for b, n in enumerate(lengths):
        returns = discounted_return(torch.arange(n, 0, -1, dtype=torch.float64), GAMMA)
        torch.testing.assert_close(found[b, :n], returns - values[b, :n], rtol=1e-6, atol=1e-7)


def test_a_perfect_baseline_leaves_no_advantage_and_shortening_gives_a_positive_one() -> None:
    mask = torch.ones(1, 6, dtype=torch.bool)
    perfect = discounted_return(torch.arange(6, 0, -1, dtype=torch.float64), GAMMA)[None]
    torch.testing.assert_close(length_advantages(perfect, mask, GAMMA, LAM), torch.zeros(1, 6, dtype=torch.float64),
                               atol=1e-7, rtol=0)  # fmt: skip
    pessimist = discounted_return(torch.arange(6, 0, -1, dtype=torch.float64) + 10, GAMMA)[None]
    assert (length_advantages(pessimist, mask, GAMMA, 1.0) > 0).all()


def test_rewards_sum_to_the_return() -> None:
    _, mask, _, lengths = batch()
    rewards = length_rewards(mask, GAMMA)
    discounts = GAMMA ** torch.arange(13)
    expected = discounted_return(torch.tensor(lengths), GAMMA)
    torch.testing.assert_close((rewards * discounts).sum(1), expected)


def test_a_sparse_task_reward_with_its_own_discount() -> None:
    values, mask, _, lengths = batch(3)
    rewards = torch.zeros_like(values)
    for b, n in enumerate(lengths):
        rewards[b, n - 1] = 1.0
    found = advantages(td_errors(rewards, values, mask, 1.0), mask, 1.0, 1.0)
    torch.testing.assert_close(found[mask], (1.0 - values)[mask])


def test_combination_and_whitening() -> None:
    values, mask, last, _ = batch(1)
    length = length_advantages(values, mask, GAMMA, LAM, last)
    task = torch.randn(5, 1, dtype=torch.float64)
    torch.testing.assert_close(combine(task, length, -0.5)[2, 3], task[2, 0] - 0.5 * length[2, 3])
    white = whiten(length, mask)
    assert float(white[mask].mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(white[mask].std(unbiased=False)) == pytest.approx(1.0, abs=1e-5)
    assert (white[~mask] == 0).all()
    kept = whiten(length, mask, shift=False)
    assert torch.equal(torch.sign(kept[mask]), torch.sign(length[mask]))
    assert (whiten(length, torch.zeros_like(mask)) == 0).all()


def test_values_are_read_before_each_token() -> None:
    z = torch.randn(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    values, last = state_values(z.requires_grad_(), mask, torch.tensor([True, False]))
    v = -torch.sigmoid(z.detach())
    torch.testing.assert_close(values[0, 2:5], v[0, 1:4])
    torch.testing.assert_close(values[1, 1:3], v[1, 0:2])
    assert (values[~mask] == 0).all()
    assert last.tolist() == [0.0, pytest.approx(float(v[1, 2]))]
    assert not values.requires_grad


def test_what_cannot_be() -> None:
    values, mask, _, _ = batch()
    with pytest.raises(ValueError, match=r"gamma must be above 0 and at most 1, got 1\.5"):
        td_errors(values, values, mask, 1.5)
    with pytest.raises(ValueError, match="lambda must be between 0 and 1, got 2"):
        advantages(values, mask, GAMMA, 2)
    with pytest.raises(ValueError, match=r"one shape \[B, T\]"):
        td_errors(values[:, 1:], values, mask, GAMMA)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        length_rewards(mask, 1.0)
    with pytest.raises(ValueError, match=r"finished \[B\]"):
        state_values(values, mask, mask)
