"""Targets and the requests made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lenvm.evaluation.data import NaturalPrompt, Sample, read_natural
from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.metrics import MODES
from lenvm.evaluation.plan import SHARE, Sizes, budget, make_plan, natural_median, natural_targets
from lenvm.request import LengthRequest


def test_targets_are_natural_lengths_spread_over_the_range():
    lengths = np.arange(1, 101)
    for seed in range(20):
        found = natural_targets(lengths, 3, (0.05, 0.95), np.random.default_rng(seed))
        assert 5 <= found[0] <= 35 <= found[1] <= 65 <= found[2] <= 95
    assert set(natural_targets(np.array([4, 4, 90]), 5, (0.05, 0.95), np.random.default_rng(0))) <= {4, 90}


def test_every_planned_request_is_valid_and_unique(world):
    data = read_natural(world.prompts, world.samples)
    plan = make_plan(data, Sizes())
    assert len({r.key for r in plan}) == len(plan)
    for request in plan:
        parsed = LengthRequest.parse(request.fields)
        assert (parsed is None) == (request.controller == "base")
        assert 0 <= request.seed < 2**31
    assert plan == make_plan(data, Sizes())  # nothing random in it
    assert {r.seed for r in plan}.isdisjoint({r.seed for r in make_plan(data, Sizes(seed=1))})


def test_controllers_of_a_mode_share_prompts_and_targets(world):
    data = read_natural(world.prompts, world.samples)
    plan = make_plan(data, Sizes(targets=2, bound_targets=1))
    for mode in MODES:
        pairs = {}
        for r in (r for r in plan if r.experiment == mode and r.controller in ("base", "hard", "posterior")):
            pairs.setdefault(r.controller, set()).add((r.prompt_id, r.sample, r.target))
        assert len(pairs["base"]) == len(data.prompts) * (2 if mode == "equal_to" else 1)
        assert pairs["base"] == pairs["hard"] == pairs["posterior"]


def test_the_trade_off_has_a_budget_at_60_per_cent_of_the_mean(world):
    data = read_natural(world.prompts, world.samples)
    limit = budget(data.problems, SHARE)
    mean = np.concatenate([p.lengths for p in data.problems]).mean()
    assert limit == round(0.6 * mean)
    plan = make_plan(data, Sizes(budgets=()))
    assert {r.target for r in plan if r.experiment == "budget"} == {limit}
    assert {r.prompt_id for r in plan if r.experiment == "median"} == {p.id for p in data.problems}


def test_modes_and_controllers_can_be_chosen(world):
    data = read_natural(world.prompts, world.samples)
    whole = {r.key: r for r in make_plan(data, Sizes())}
    chosen = make_plan(data, Sizes(modes=("equal_to",), controllers=("posterior",)))
    assert {r.controller for r in chosen if r.experiment == "equal_to"} == {"base", "posterior"}
    assert {r.experiment for r in chosen} == {"equal_to", "median", "bias"}
    assert all(whole[r.key] == r for r in chosen), "leaving something out changes nothing of the rest"
    with pytest.raises(ValueError, match="unknown controller 'hrad', allowed are base, hard"):
        Sizes(controllers=("hrad",))
    with pytest.raises(ValueError, match="equal_to"):
        Sizes(modes=("equals",))


def test_median_is_a_length_that_occurred(world):
    prompt = read_natural(world.prompts, world.samples).prompts[0]
    assert natural_median(prompt) in prompt.lengths


def test_data_errors_name_the_place(world, tmp_path):
    with pytest.raises(EvaluationError, match="there is no file"):
        read_natural(tmp_path / "no.jsonl", world.samples)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "a"}\n')
    with pytest.raises(EvaluationError, match=r"line 1 lacks messages; it has id"):
        read_natural(broken, world.samples)
    broken.write_text("{oops\n")
    with pytest.raises(EvaluationError, match="line 1 is not JSON"):
        read_natural(broken, world.samples)
    mixed = tmp_path / "mixed.jsonl"
    rows = [json.loads(line) for line in world.samples.read_text().splitlines()[:2]]
    rows[1]["sampling"]["temperature"] = 0.5
    mixed.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(EvaluationError, match="mixes 2 sampling settings"):
        read_natural(world.prompts, mixed)
    broken.write_text('{"id": "other", "messages": []}\n')
    with pytest.raises(EvaluationError, match="no prompt of"):
        read_natural(broken, world.samples)


def test_targets_come_from_completions_that_ended():
    samples = tuple(Sample("", (0,) * n, reason) for n, reason in [(5, "stop"), (9, "stop"), (64, "length")])
    prompt = NaturalPrompt("a", [], (1,), samples)
    assert prompt.ended_lengths.tolist() == [5, 9]
    assert natural_median(prompt) == 5
    assert NaturalPrompt("b", [], (1,), samples[2:]).ended_lengths.tolist() == [64]


def test_a_cut_answer_is_not_right(world):
    problem = read_natural(world.prompts, world.samples).problems[3]
    assert problem.is_right("w1 Answer: 3", "stop")
    assert not problem.is_right("w1 Answer: 3", "length")
