"""Our second search: Thompson sampling on the belief that blocks' losses nearly add up.

    belief     loss(plan) = a + sum of c_i over the plan + sum of d_ij over its pairs + noise
               c ~ N(prior, 1),   d ~ N(0, pairs^2),   losses in units of their spread
    ask        the plan that is best under a draw of c and d from the belief, given all losses so far; the first
               question of each round is the plan that is best under the mean, if it has not been paid for
    answer     the best plan that was paid for

The prior is block influence (see `influence.py`), standardised. Skipped blocks do not add up exactly: two may do the
same work, of which one is needed. The pairs hold that; `noise` is what larger sets are believed to add, and the answer
rests on losses that were measured, not on the belief.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.methods.base import METHODS
from trimtab.methods.skip.budget import Goal, Indices
from trimtab.methods.skip.search.influence import block_influence, costs_at_first
from trimtab.methods.skip.search.searched import Found, Losses, Searched, SearchedSettings
from trimtab.settings import within


@dataclass(frozen=True)
class LinearSettings(SearchedSettings):
    """Settings of the linear bandit."""

    evaluations: int = 30
    """Most plans to pay for."""
    noise: float = 0.05
    """Variance of a loss around the sum of its blocks and pairs, in units of the losses' variance."""
    pairs: float = 0.6
    """Spread of what two blocks cost together beyond what each costs, in units of the spread of single blocks."""
    prior: float = 0.25
    """Spread of the blocks' costs believed at first, from block influence; 0 starts even."""
    patience: int = 50
    """Draws in a row that lead to plans paid for already, after which the search stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(vars(self), evaluations="[1, inf)", patience="[1, inf)", noise="(0, inf)", pairs="(0, inf)",
               prior="[0, inf)")  # fmt: skip


def linear(losses: Losses, goal: Goal, generator: torch.Generator, settings: LinearSettings,
           influence: Sequence[float] | None = None) -> Found:  # fmt: skip
    """Search by Thompson sampling with a belief about blocks and pairs of them.

    Args:
        losses: of plans; asked twice for one, it pays once.
        goal: what a plan must save.
        generator: of the draws.
        influence: of each candidate, for the prior; None starts even.
    """
    start = settings.prior * costs_at_first(influence, len(goal))
    known: dict[Indices, float] = {}
    trace = []
    mean, covariance = belief(start, known, settings)
    while len(known) < settings.evaluations:
        plan = _next(mean, covariance, goal, generator, known, settings.patience)
        if plan is None:
            break
        known[plan] = losses([plan])[0]
        mean, covariance = belief(start, known, settings)
        trace.append({"step": len(known), "subsets": [list(plan)], "losses": [known[plan]],
                      "gates": [round(-c, 6) for c in mean[: len(goal)].tolist()]})  # fmt: skip
    return Found(min(known, key=lambda p: (known[p], p)), (-mean[: len(goal)]).tolist(), trace)


def belief(start: Tensor, known: dict[Indices, float], settings: LinearSettings) -> tuple[Tensor, Tensor]:
    """Mean (f) and covariance (f, f) of what blocks and then pairs cost, f = n + n (n - 1) / 2, after the losses known
    so far: Bayesian linear regression.

    Args:
        start: (n) mean of the blocks' costs at first.
    """
    n = len(start)
    variance = torch.ones(n + n * (n - 1) // 2, dtype=torch.float64)
    variance[n:] = settings.pairs**2
    mean = torch.cat([start, torch.zeros_like(variance[n:])])
    if len(known) < 2:  # one loss alone tells nothing about differences
        return mean, variance.diag()
    blocks = torch.zeros(len(known), n, dtype=torch.float64)
    for row, plan in zip(blocks, known, strict=True):
        row[list(plan)] = 1
    first, second = torch.triu_indices(n, n, offset=1)
    x = torch.cat([blocks, blocks[:, first] * blocks[:, second]], dim=1)
    y = torch.tensor(list(known.values()), dtype=torch.float64)
    x, y = x - x.mean(0), (y - y.mean()) / y.std().clamp(min=1e-9)
    covariance = torch.linalg.inv(x.T @ x / settings.noise + (1 / variance).diag())
    return mean + covariance @ x.T @ (y - x @ mean) / settings.noise, covariance


def best_plan(costs: Tensor, goal: Goal) -> Indices:
    """The plan of lowest cost, block after block: next the one that adds least to those taken before.

    Args:
        costs: (f) of blocks and then of pairs.
    """
    n = len(goal)
    pairs = torch.zeros(n, n, dtype=costs.dtype)
    first, second = torch.triu_indices(n, n, offset=1)
    pairs[first, second] = pairs[second, first] = costs[n:]
    adds = costs[:n].clone()
    order: list[int] = []
    while not goal.enough(order):
        order.append(int(adds.argmin()))
        adds += pairs[order[-1]]
        adds[order[-1]] = torch.inf
    return goal.fill(order)


def _next(mean: Tensor, covariance: Tensor, goal: Goal, generator: torch.Generator, known: dict[Indices, float],
          patience: int) -> Indices | None:  # fmt: skip
    """The next plan to pay for; None if the belief keeps pointing at plans that are known."""
    root = torch.linalg.cholesky(covariance)
    for attempt in range(patience + 1):
        noise = torch.randn(len(mean), generator=generator, dtype=torch.float64)
        plan = best_plan(mean if attempt == 0 else mean + root @ noise, goal)
        if plan not in known:
            return plan
    return None


@METHODS.register("linear-skip")
class LinearSkip(Searched):
    """Plans that are best under a drawn belief that losses of blocks add up; starts from block influence."""

    Settings = LinearSettings
    settings: LinearSettings

    def compare(self, losses, goal, session, candidates, generator) -> Found:
        batch = next(session.batches("validation", self.settings.rows))
        influence = block_influence(session.with_task, session.plain, candidates, batch)
        return linear(losses, goal, generator, self.settings, influence)
