"""`attend_prefix` against float64, whatever the prefix is cut into; edges, and planted bugs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lenvm_kernels
from lenvm_kernels import SharedRows, attend_prefix, reference
from lenvm_kernels.fused import attend as fused
from tests.kernels.checks import quick
from tests.kernels.checks.planted import load

assert quick
SOURCE = Path(lenvm_kernels.__file__).parent / "fused" / "attend.py"
POOL, CONTEXT, SLOTS = 6, 300, 900


class Case:
    """Rows with prefixes of `lengths` tokens, `slots` candidates each, and caches with NaN wherever nobody may look."""

    def __init__(
        self, lengths: list[int], slots: int, heads: int = 4, kv_heads: int = 2, width: int = 16, value_width: int = 16,
        dtype: torch.dtype = torch.float32, seed: int = 0,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        rows = len(lengths)
        every = torch.randperm(SLOTS, generator=g)
        table = torch.randint(0, SLOTS, (POOL, CONTEXT), generator=g, dtype=torch.int32)  # behind a prefix: anything
        pool_rows = torch.randperm(POOL, generator=g)[:rows]
        used: list[torch.Tensor] = []
        for row, length in zip(pool_rows.tolist(), lengths, strict=True):
            mine, every = every[:length], every[length:]
            table[row, :length] = mine.int()
            used.append(mine)
        wide = every[: rows * (slots + 2)].view(rows, slots + 2)
        used.append(wide[:, :slots].flatten())
        empty = torch.ones(SLOTS, dtype=torch.bool)
        empty[torch.cat(used)] = False
        shape = (rows * slots, heads, width)
        self.query = (torch.randn(*shape[:1], 2 * heads, width, generator=g) * 2).to(dtype)[:, :heads]  # of a wider one
        self.keys = torch.randn(SLOTS, kv_heads, width, generator=g).to(dtype)
        self.values = torch.randn(SLOTS, kv_heads, value_width, generator=g).to(dtype)
        self.keys[empty], self.values[empty] = torch.nan, torch.nan
        self.rows = SharedRows(pool_rows, torch.tensor(lengths, dtype=torch.int32), wide[:, :slots], table)
        self.scaling = 0.3

    def run(self, function=attend_prefix, **given: object) -> torch.Tensor:
        return function(self.query, self.rows, self.keys, self.values, self.scaling, **given)

    def truth(self) -> torch.Tensor:
        return reference.attend_prefix(self.query.double(), self.rows, self.keys, self.values, self.scaling)

    def wrong(self, got: torch.Tensor) -> bool:
        near = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[self.query.dtype]
        return not torch.allclose(got.double(), self.truth(), rtol=near, atol=near)


def test_the_reference_is_attention() -> None:
    """Of one row with one KV head for each query head, as torch's own attention."""
    case = Case([37], 5, heads=2)
    prefix = case.rows.requests[case.rows.pool_rows[0], :37].long()
    seen = torch.cat([prefix, case.rows.own[0]])
    mask = torch.cat([torch.zeros(5, 37), torch.full((5, 5), -torch.inf).fill_diagonal_(0.0)], dim=1)
    q, k, v = (t.transpose(0, 1) for t in (case.query, case.keys[seen], case.values[seen]))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=case.scaling)
    assert torch.allclose(case.run(reference.attend_prefix), want.transpose(0, 1), atol=1e-6)


@pytest.mark.parametrize("cut", [1, 2, 8])
@pytest.mark.parametrize(
    "case",
    [
        Case([1, 64, 65, 0], 3),
        Case([200], 16, heads=12),  # 96 pairs: one block
        Case([130, 7], 24, heads=12, seed=1),  # 144 pairs: two blocks
        Case([63, 129], 1, heads=6, seed=2),
        Case([140, 3], 4, heads=3, kv_heads=1, width=24, value_width=40, seed=3),  # no powers of two
        Case([100, 70], 4, dtype=torch.bfloat16, seed=4),
        Case([100, 70], 4, dtype=torch.float16, seed=5),
    ],
    ids=["edges", "a block", "two blocks", "one candidate", "odd widths", "bfloat16", "float16"],
)
def test_against_float64(case: Case, cut: int) -> None:
    got = case.run(fused.attend_prefix, cut=cut)
    assert got.dtype == case.query.dtype
    assert not case.wrong(got)


def test_a_row_does_not_see_the_others() -> None:
    """Cut alike, a row alone is the row in a batch, bit for bit."""
    case = Case([90, 5, 128], 4)
    together = case.run(fused.attend_prefix, cut=2).view(3, 4, 4, 16)
    for row in range(3):
        alone = SharedRows(*(t[row : row + 1] for t in case.rows[:3]), case.rows.requests)
        query = case.query[row * 4 : row * 4 + 4]
        got = fused.attend_prefix(query, alone, case.keys, case.values, case.scaling, cut=2)
        assert torch.equal(got, together[row])


def test_pieces_fill_a_device_and_no_more() -> None:
    assert [fused.pieces(programs, 132) for programs in (1, 2, 4, 16, 64, 200, 264, 265, 5000)] == [
        64, 64, 64, 16, 4, 1, 1, 1, 1
    ]  # fmt: skip


MUTANTS = {
    "all see the first candidate": ("(own[None, :] == (m // GROUP)[:, None])", "(own[None, :] == (m * 0)[:, None])"),
    "own token left out": ("| (own[None, :] == (m // GROUP)[:, None])", "| (own[None, :] == -1)"),
    "pieces overlap": ("begin = piece * size", "begin = piece * size - piece"),
    "the last token left out": ("own = n - length\n", "own = n - length + 1\n"),
    "sums not shrunk": ("total = total * shrink +", "total = total +"),
    "values not shrunk": ("value.to(tl.float32), found * shrink[:, None])", "value.to(tl.float32), found)"),
    "another head's keys": ("head = kv_head * GROUP + m % GROUP", "head = kv_head + m % GROUP * (HEADS // GROUP)"),
    "another candidate": ("candidate = row * K + m // GROUP", "candidate = row * K + m % K"),
    "pieces not weighed": ("tl.exp2(weight - top)[:, None] *", "tl.exp2(top - top)[:, None] *"),
    "natural exponents": ("scaling * LOG2_E", "scaling"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    old, new = MUTANTS[name]
    text = SOURCE.read_text()
    assert text.count(old) == 1, f"the kernel changed: {old!r} occurs {text.count(old)} times"
    module = load("mutant_attend_" + "".join(c if c.isalnum() else "_" for c in name), text.replace(old, new), tmp_path)
    case = Case([1, 130, 65], 3)
    assert any(case.wrong(case.run(module.attend_prefix, cut=cut)) for cut in (1, 4))
