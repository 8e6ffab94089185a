"""Targets and budgets: how many blocks go, and what a plan costs."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from tests.methods.skipping import prepared, session_of
from trimtab.counting import count_inside, count_macs, time_inside
from trimtab.methods.skip import budget
from trimtab.methods.skip.budget import BlockCosts, Goal, parse
from trimtab.methods.skip.plan import Plan


def test_a_number_of_blocks_is_a_target_whose_plans_are_the_sets_of_that_size():
    goal = Goal.count(5, 2)
    assert list(goal.plans()) == list(combinations(range(5), 2)) and goal.number() == 10
    assert goal.fill([3, 1, 0]) == (1, 3)


def test_plans_of_a_budget_are_enough_and_hold_no_block_too_many():
    goal = Goal((5.0, 1.0, 2.0, 4.0), 6.0, "macs")
    plans = list(goal.plans())
    assert plans == [(0, 1), (0, 2), (0, 3), (2, 3)]
    for plan in plans:
        assert goal.enough(plan) and not any(goal.enough([j for j in plan if j != i]) for i in plan)
    assert goal.fill([1, 0, 3]) == (0, 1)
    assert goal.fill([1, 2, 3]) == (2, 3), "block 1 turned out not to be needed"


def test_a_budget_is_a_share_of_the_dense_model_adapters_included():
    costs = BlockCosts("macs", dense=100, total=110, blocks=(30,) * 3, kept=(32,) * 3, skipped=(2,) * 3)
    goal = costs.goal(0.2)  # 30 of 110 must go to reach 80
    assert goal.needed == 30 and goal.fill([0, 1, 2]) == (0,)
    assert costs.of((0,)) == 80
    assert costs.goal(0.25).fill([2, 1, 0]) == (1, 2)
    with pytest.raises(ValueError, match=r"60% macs cannot be saved .* it is at most 50.0%"):
        costs.goal(0.6)


def test_a_block_whose_place_costs_more_than_it_saves_is_in_no_plan():
    goal = Goal((10.0, 10.0, -5.0), 18.0, "params")
    assert list(goal.sizes()) == [2] and list(goal.plans()) == [(0, 1)]
    costs = BlockCosts("params", dense=100, total=100, blocks=(10,) * 3, kept=(10,) * 3, skipped=(0, 0, 15))
    assert costs.goal(0.2).fill([0, 1, 2]) == (0, 1), "the third block stays, so both others may go"


@pytest.mark.parametrize("text", ["30 macs", "130% macs", "30% flops", "0% macs", "-3% params"])
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="expected how much less of what"):
        parse(text)


def test_budgets_as_people_write_them():
    assert parse("30% macs") == (0.3, "macs")
    assert parse(" 12.5 % fewer params ") == (0.125, "params")


def test_a_budget_finds_how_many_blocks_go(tiny_raw, monkeypatch):
    state = prepared(tiny_raw, {"name": "random-skip", "budget": "30% macs"})
    plan = Plan.from_dict(state)
    assert plan.macs <= 0.7 * plan.dense_macs < plan.macs + min(b.saved for b in plan.blocks)
    fewer = Plan.from_dict(prepared(tiny_raw, {"name": "random-skip", "budget": "10% params"}))
    assert 0 < len(fewer.skipped) < len(plan.skipped)
    monkeypatch.setattr(budget, "time_inside", count_inside)  # time itself decides no test
    assert prepared(tiny_raw, {"name": "random-skip", "budget": "30% latency"})["skip"] == state["skip"]


def test_milliseconds_of_parts_are_within_those_of_the_whole():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    whole, parts = time_inside(list(model), lambda: model(torch.ones(8, 64)), repeats=3)
    assert len(parts) == 2 and min(parts) > 0 and whole > 0


def test_macs_of_a_plan_are_those_of_the_model_with_it(tiny_raw):
    parts, session = session_of(tiny_raw, {"name": "random-skip", "skip": 3})
    method = parts.methods[0]
    one = parts.model.example(1)
    parts.model.eval()
    dense = count_macs(lambda: parts.model(**one))
    method.prepare(session)
    parts.attach()
    plan = Plan.from_dict(method.state)
    assert plan.dense_macs == dense and plan.macs == count_macs(lambda: parts.model.eval()(**one))
