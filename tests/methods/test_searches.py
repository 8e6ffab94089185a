"""Every search on losses that are known: it finds the best plan, pays once and stops."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import nn

from tests.methods.skipping import BEST, COSTS, losses
from trimtab.anatomy import Block
from trimtab.methods.skip.budget import Goal
from trimtab.methods.skip.search.bandit import BanditSettings, bandit, log_probability, log_probability_of_set
from trimtab.methods.skip.search.das import Gates
from trimtab.methods.skip.search.evaluate import Evaluator
from trimtab.methods.skip.search.exhaustive import exhaustive
from trimtab.methods.skip.search.greedy import greedy
from trimtab.methods.skip.search.influence import block_influence
from trimtab.methods.skip.search.linear import LinearSettings, belief, best_plan, linear


def test_greedy_and_exhaustive_find_the_best_plan_where_blocks_add_up():
    goal = Goal.count(8, 3)
    assert greedy(losses, goal).plan == BEST
    found = exhaustive(losses, goal)
    assert found.plan == BEST
    assert sorted(range(8), key=lambda i: -found.scores[i]) == sorted(range(8), key=lambda i: COSTS[i])
    with pytest.raises(ValueError, match="56 plans for 8 blocks, the limit is 10"):
        exhaustive(losses, goal, limit=10)


def test_greedy_asks_for_one_block_after_the_other():
    evaluator = Evaluator(losses, [str(i) for i in range(8)])
    greedy(evaluator, Goal.count(8, 3))
    assert evaluator.evaluations == 8 + 7 + 6


def test_plackett_luce_is_the_probability_of_draws_without_replacement():
    theta = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
    plans = list(combinations(range(4), 2))
    total = sum(log_probability_of_set(theta, p).exp() for p in plans)
    assert float(total) == pytest.approx(1)
    torch.manual_seed(0)
    drawn = torch.multinomial(theta.exp().expand(20000, -1), 2)
    for plan in plans:
        share = float((drawn.sort(1).values == torch.tensor(plan)).all(1).double().mean())
        assert share == pytest.approx(float(log_probability_of_set(theta, plan).exp()), abs=0.015)
    ordered = float(log_probability(theta, (2, 0)).exp())
    p = theta.softmax(0)
    assert ordered == pytest.approx(float(p[2] * p[0] / (1 - p[2])))


def test_the_bandit_climbs_the_expected_reward():
    """Its step, averaged over many draws, is the gradient of the expected reward by the policy."""
    from trimtab.methods.skip.search.bandit import _draw, _step

    theta = torch.tensor([0.2, -0.3, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    plans = list(combinations(range(4), 2))
    cost = torch.tensor([COSTS[a] + COSTS[b] for a, b in plans], dtype=torch.float64)
    expected = -(torch.stack([log_probability_of_set(theta, p).exp() for p in plans]) * cost).sum()
    (want,) = torch.autograd.grad(expected, theta)
    generator, goal = torch.Generator().manual_seed(0), Goal.count(4, 2)
    known = {p: float(c) for p, c in zip(plans, cost, strict=True)}
    settings = BanditSettings(draws=4, evaluations=100)
    got = torch.zeros(4, dtype=torch.float64)
    spread = float(torch.tensor(list(known.values()), dtype=torch.float64).std())
    for _ in range(400):
        orders = _draw(theta.detach(), goal, generator, settings, known)
        found = [known[tuple(sorted(o))] for o in orders]
        got += (_step(theta.detach(), orders, found, list(known.values()), 1.0) - theta.detach()) * spread / 400
    torch.testing.assert_close(got, want, atol=0.04, rtol=0.1)


def test_the_bandit_finds_the_best_plan_pays_once_and_stops():
    hits = 0
    for seed in range(10):
        evaluator = Evaluator(losses, [str(i) for i in range(8)])
        settings = BanditSettings(skip=3, evaluations=40)
        found = bandit(evaluator, Goal.count(8, 3), torch.Generator().manual_seed(seed), settings, COSTS)
        assert evaluator.evaluations <= 40
        hits += found.plan == BEST
        assert evaluator.known[found.plan] == min(evaluator.known[p] for p in evaluator.asked)
    assert hits == 10
    assert evaluator.evaluations < 20, "with a prior that is right it settles early"


def test_the_linear_bandit_finds_the_best_plan_pays_once_and_stops():
    for seed in range(5):
        evaluator = Evaluator(losses, [str(i) for i in range(8)])
        settings = LinearSettings(skip=3, evaluations=20)
        found = linear(evaluator, Goal.count(8, 3), torch.Generator().manual_seed(seed), settings)
        assert found.plan == BEST and evaluator.evaluations <= 20
        assert sorted(range(8), key=lambda i: -found.scores[i])[:3] == [1, 4, 7]
    informed = Evaluator(losses, [str(i) for i in range(8)])
    linear(informed, Goal.count(8, 3), torch.Generator().manual_seed(0), LinearSettings(patience=3), COSTS)
    assert next(iter(informed.asked)) == BEST, "the prior's own answer is the first question"
    assert informed.evaluations < 20, "it stops when it is sure"


def test_the_belief_is_what_the_losses_say():
    """With all plans known and little noise it is the least-squares solution: the true costs, up to scale."""
    known = {p: losses([p])[0] for p in combinations(range(8), 3)}
    settings = LinearSettings(noise=1e-6, pairs=1e-4)
    mean, covariance = belief(torch.zeros(8, dtype=torch.float64), known, settings)
    spread = float(torch.tensor(list(known.values()), dtype=torch.float64).std())
    want = torch.tensor(COSTS, dtype=torch.float64)
    torch.testing.assert_close(mean[:8] * spread, want - want.mean(), atol=1e-3, rtol=0)
    assert float(mean[8:].abs().max()) < 0.01 and float(covariance.diagonal().max()) < 1


def test_the_linear_bandit_sees_that_two_blocks_do_the_same_work():
    """Each of 2 and 5 alone is free, both together are dear; sums of single costs would take them both."""

    def redundant(plans):
        return [losses([p])[0] - 4 * len({2, 5} & set(p)) + 9 * ({2, 5} <= set(p)) for p in plans]

    plans = list(combinations(range(8), 3))
    known = {p: redundant([p])[0] for p in plans[::2]}
    for pairs, both in ((0.6, False), (1e-4, True)):
        mean, _ = belief(torch.zeros(8, dtype=torch.float64), known, LinearSettings(skip=3, pairs=pairs))
        assert ({2, 5} <= set(best_plan(mean, Goal.count(8, 3)))) == both
    third = sorted(redundant(plans))[2]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        found = linear(redundant, Goal.count(8, 3), generator, LinearSettings(skip=3, evaluations=20))
        assert redundant([found.plan])[0] <= third


def test_the_bandit_starts_even_without_influence():
    hits = 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        plan = bandit(losses, Goal.count(8, 3), generator, BanditSettings(skip=3, evaluations=40), None).plan
        hits += sum(losses([plan])) <= sorted(losses(combinations(range(8), 3)))[2]
    assert hits >= 8


@pytest.mark.parametrize("kind", [BanditSettings, LinearSettings])
def test_a_prior_that_turns_influence_round_is_refused(kind):
    assert kind(prior=0).prior == 0
    with pytest.raises(ValueError, match="prior must be at least 0, found -1"):
        kind(prior=-1)


def test_searches_take_a_budget():
    goal = Goal((3.0, 1.0, 1.0, 3.0, 1.0, 3.0, 3.0, 1.0), 4.0, "macs")
    best = min(goal.plans(), key=lambda p: losses([p])[0])
    assert best == exhaustive(losses, goal).plan
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        plan = bandit(losses, goal, generator, BanditSettings(evaluations=30), COSTS).plan
        assert goal.enough(plan) and losses([plan])[0] <= losses([best])[0] + 0.3
        plan = linear(losses, goal, generator, LinearSettings(evaluations=30), COSTS).plan
        assert goal.enough(plan) and losses([plan])[0] <= losses([best])[0] + 0.3
    gates = Gates(8, goal, generator=torch.Generator().manual_seed(0))
    for subset in gates.subsets(5):
        assert goal.enough(subset)
    assert goal.enough(gates.best())


def test_gates_draw_from_their_own_generator():
    one, two = (Gates(8, 3, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    drawn = [one.draw() for _ in range(5)]
    torch.rand(7)
    assert [two.draw() for _ in range(5)] == drawn


def test_influence_is_one_less_the_cosine_of_input_and_output():
    class Turn(nn.Module):
        def __init__(self, degrees):
            super().__init__()
            a = math.radians(degrees)
            self.turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, hidden_states):
            return hidden_states @ self.turn.T * 3

    model = nn.Sequential(Turn(60), Turn(0), Turn(90))
    wrapped = nn.Module()
    wrapped.layers = model
    wrapped.forward = lambda x: model(x)
    blocks = [Block(f"layers.{i}", 2) for i in range(3)]
    found = block_influence(wrapped, wrapped, blocks, {"x": torch.randn(4, 5, 2)})
    assert found == pytest.approx([0.5, 0, 1], abs=1e-5)
