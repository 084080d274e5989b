"""Keyed noise: its distribution, its independence of the batch."""

import math

import torch

from lenvm.sampler import draw, keyed_gumbel, keyed_uniform

WORD = (1 << 64) - 1


def splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def test_hash_against_unsigned_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (50,), generator=generator)
    positions = torch.arange(50)
    tokens = torch.randint(0, 150_000, (50,), generator=generator)
    got = keyed_uniform(seeds, positions, tokens)
    for s, p, t, u in zip(seeds.tolist(), positions.tolist(), tokens.tolist(), got.tolist(), strict=True):
        key = splitmix(splitmix(splitmix(s & WORD) ^ p) ^ t)
        assert u == ((key >> 11) + 0.5) * 2.0**-53


def test_frequencies_follow_p() -> None:
    """Chi-square over 40,000 draws of one distribution, keyed by position alone."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    draws = 40_000
    slots = draw(
        p.log().expand(draws, -1),
        torch.tensor([11, 5, 900, 3, 40]).expand(draws, -1),
        torch.full((draws,), 7),
        torch.arange(draws),
        torch.zeros(draws, dtype=torch.bool),
    )
    counts = torch.bincount(slots, minlength=5).double()
    chi_square = ((counts - draws * p) ** 2 / (draws * p)).sum().item()
    assert chi_square < 18.47  # 99.9 % point at 4 degrees of freedom; the draw is deterministic


def test_gumbel_moments() -> None:
    noise = keyed_gumbel(torch.tensor(3), torch.arange(100_000), torch.tensor(1))
    assert abs(noise.mean().item() - 0.5772) < 0.02
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.05


def test_draw_is_independent_of_batch_and_slot() -> None:
    generator = torch.Generator().manual_seed(1)
    log_p = torch.randn(6, 9, generator=generator).log_softmax(-1)
    ids = torch.stack([torch.randperm(1000, generator=generator)[:9] for _ in range(6)])
    seeds, positions, greedy = torch.arange(6), torch.arange(6) * 3, torch.tensor([False] * 4 + [True] * 2)
    tokens = ids.gather(-1, draw(log_p, ids, seeds, positions, greedy)[:, None])[:, 0]
    order = torch.randperm(9, generator=generator)
    for row in range(6):
        alone = draw(
            log_p[row : row + 1, order],
            ids[row : row + 1, order],
            seeds[row : row + 1],
            positions[row : row + 1],
            greedy[row : row + 1],
        )
        assert ids[row, order][alone[0]] == tokens[row]


def test_empty_slots_are_never_drawn_and_ties_go_to_the_lower_id() -> None:
    log_p = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(500, -1)
    ids = torch.tensor([[1, 2, 3]]).expand(500, -1)
    assert (draw(log_p, ids, torch.arange(500), torch.arange(500), torch.zeros(500, dtype=torch.bool)) == 1).all()
    tie = draw(
        torch.tensor([[-1.0, -1.0]]), torch.tensor([[9, 4]]), torch.tensor([0]), torch.tensor([0]), torch.tensor([True])
    )
    assert tie.item() == 1
