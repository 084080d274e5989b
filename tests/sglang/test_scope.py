"""Where thinking ends: the bookkeeping of `length_scope`, without a server."""

from __future__ import annotations

import pytest
import torch

from lenvm.candidates import Candidates
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Mode, Scores
from lenvm_sglang.scope import Scope, ThinkTags, aim, counted, probe_end

TAGS, STOPS = ThinkTags(3, 4), frozenset({2})


def begin(counts: str, prompt: list[int], reasoning: bool = False) -> Scope:
    return Scope.begin(counts, TAGS, prompt, STOPS, reasoning)


@pytest.mark.parametrize(
    ("prompt", "opened", "thought"),
    [
        ([9, 3], True, None),
        ([9, 3, 4], False, 0),
        ([9, 3, 9, 4, 9, 2, 9], False, None),  # an earlier turn's thinking is none of this one's
        ([9, 3, 9, 4, 9, 2, 9, 3, 9], True, None),
        ([9], False, None),
    ],
)
def test_what_a_prompt_says(prompt: list[int], opened: bool, thought: int | None) -> None:
    scope = begin("answer", prompt)
    assert (scope.opened, scope.thought) == (opened, thought)
    assert begin("answer", [9], reasoning=True).opened


def steered(scope: Scope, completion: list[int], lag: int) -> list[bool]:
    """Which positions are guided, if the host sees each token `lag` steps later than it could."""
    out = []
    for position in range(len(completion) + 1):
        scope.read(completion[: max(position - lag, 0)])
        out.append(scope.steers(position))
    return out


@pytest.mark.parametrize("lag", [0, 1])
def test_phases_do_not_depend_on_overlap(lag: int) -> None:
    thinks = [9, 9, 4, 9, 9, 2]  # the first token of the answer, position 3, is the base model's
    assert steered(begin("answer", [3]), thinks, lag) == [False] * 4 + [True] * 3
    # position 3 is the base model's too: there the device itself sees the tag (`aim`)
    assert steered(begin("thinking", [3]), thinks, lag) == [True] * 4 + [False] * 3
    opens = [3, 9, 4, 9, 9]
    assert steered(begin("thinking", [9]), opens, lag)[:3] == [False, False, True]
    plain = [9, 9, 9]
    assert steered(begin("answer", [9]), plain, lag) == [False, False, True, True]
    assert not any(steered(begin("thinking", [9]), plain, lag))
    assert all(steered(begin("answer", [3, 4]), plain, lag))


def test_what_counts() -> None:
    assert [counted(c, 3, 10) for c in ("all", "thinking", "answer")] == [10, 3, 7]
    assert [counted(c, None, 10) for c in ("all", "thinking", "answer")] == [10, 10, 0]
    scope = begin("answer", [3])
    scope.read([9, 9, 4, 9])
    assert scope.offset == 3
    other = begin("thinking", [3])
    other.read([9, 9, 4, 9])
    assert other.offset == 0


def test_aim_moves_the_target_by_the_expected_answer() -> None:
    config = LenvmConfig(gamma=0.97, bins=tuple(range(1, 41)), heads=("value", "length"))
    ids = torch.tensor([[9, 4, 2], [9, 8, 7], [9, 8, 7], [9, 8, 7], [9, 8, 7]])
    sets = Candidates(ids, torch.log(torch.full((5, 3), 1 / 3)), ids == 2)
    end = torch.tensor([4, 4, -1, 4, 4])
    drawn, scored = probe_end(sets, end)
    assert drawn.kept.tolist() == [[True] * 3, [True, True, False], [True] * 3] + [[True, True, False]] * 2
    assert scored.token_ids[:, -1].tolist() == [2, 4, 7, 4, 4]
    assert bool(scored.kept.all())
    length = torch.full((5, 3, 40), -100.0)
    length[..., 11] = 0.0  # 12 tokens to come, whatever is chosen
    n = 5
    rows = GuidanceRows(
        mode=torch.tensor([Mode.EQUAL_TO] * 4 + [Mode.AT_LEAST]), control=torch.full((n,), Control.POSTERIOR),
        target=torch.tensor([20, 20, 20, 20, 3]), emitted=torch.tensor([5, 30, 5, 5, 5]),
        sharpness=torch.ones(n), tolerance=torch.zeros(n), strict=torch.zeros(n, dtype=torch.bool),
        bias=torch.zeros(n),
    )  # fmt: skip
    over = torch.tensor([False, False, True, True, False])
    moved = aim(rows, end, over, scored, Scores(torch.zeros(n, 3), length), config)
    # past the bound the shortest way out is the tag, behind which 12 tokens are to come
    assert moved.target.tolist() == [32, 43, 20, 32, 18]
    assert moved.left.tolist()[:3] == [26, 12, 14]
    assert moved.control.tolist() == [Control.POSTERIOR] * 3 + [Control.NONE] * 2
