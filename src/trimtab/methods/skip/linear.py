"""Our second search: Thompson sampling on the belief that blocks' losses add up.

    belief     loss(plan) = a + sum of c_i over the plan,   c ~ N(prior, 1),   losses in units of their spread
    ask        the plan that is best under a draw of c from the belief, given all losses so far; the first question of
               each round is the plan that is best under the mean, if it has not been paid for
    answer     the best plan that was paid for

The prior is block influence (see `influence.py`), standardised. Skipped blocks do not add up exactly; `noise` is how
far they are believed to be from it, and the answer rests on losses that were measured, not on the belief.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.methods.base import METHODS
from trimtab.methods.skip.budget import Indices, Target
from trimtab.methods.skip.influence import block_influence
from trimtab.methods.skip.searched import Found, Losses, Searched, SearchedSettings, validation_batch


@dataclass(frozen=True)
class LinearSettings(SearchedSettings):
    """Settings of the linear bandit."""

    evaluations: int = 30
    """Most plans to pay for."""
    noise: float = 0.15
    """Variance of a loss around the sum of its blocks, in units of the losses' variance."""
    prior: float = 1.0
    """Spread of the blocks' costs believed at first, from block influence; 0 starts even."""
    patience: int = 20
    """Draws in a row that lead to plans paid for already, after which the search stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluations < 1 or self.noise <= 0 or self.patience < 1:
            raise ValueError(
                f"evaluations and patience must be at least 1 and noise above 0, found {self.evaluations}, "
                f"{self.patience} and {self.noise}"
            )


def linear(losses: Losses, target: Target, generator: torch.Generator, settings: LinearSettings,
           influence: Sequence[float] | None = None) -> Found:  # fmt: skip
    """Search by Thompson sampling with a linear belief.

    Args:
        losses: of plans; asked twice for one, it pays once.
        target: what a plan must save.
        generator: of the draws.
        influence: of each candidate, for the prior; None starts even.
    """
    start = torch.zeros(len(target), dtype=torch.float64)
    if influence is not None and len(target) > 1:
        x = torch.tensor(influence, dtype=torch.float64).clamp(min=1e-9).log()
        start = settings.prior * (x - x.mean()) / x.std().clamp(min=1e-9)
    known: dict[Indices, float] = {}
    trace = []
    mean, covariance = belief(start, known, settings.noise)
    while len(known) < settings.evaluations:
        plan = _next(mean, covariance, target, generator, known, settings.patience)
        if plan is None:
            break
        known[plan] = losses([plan])[0]
        mean, covariance = belief(start, known, settings.noise)
        trace.append({"step": len(known), "subsets": [list(plan)], "losses": [known[plan]],
                      "gates": [round(-c, 6) for c in mean.tolist()]})  # fmt: skip
    return Found(min(known, key=lambda p: (known[p], p)), (-mean).tolist(), trace)


def belief(start: Tensor, known: dict[Indices, float], noise: float) -> tuple[Tensor, Tensor]:
    """Mean (n) and covariance (n, n) of the blocks' costs after the losses known so far: Bayesian linear regression."""
    identity = torch.eye(len(start), dtype=torch.float64)
    if len(known) < 2:  # one loss alone tells nothing about differences
        return start, identity
    x = torch.zeros(len(known), len(start), dtype=torch.float64)
    for row, plan in zip(x, known, strict=True):
        row[list(plan)] = 1
    y = torch.tensor(list(known.values()), dtype=torch.float64)
    x, y = x - x.mean(0), (y - y.mean()) / y.std().clamp(min=1e-9)
    covariance = torch.linalg.inv(x.T @ x / noise + identity)
    return start + covariance @ x.T @ (y - x @ start) / noise, covariance


def _next(mean: Tensor, covariance: Tensor, target: Target, generator: torch.Generator, known: dict[Indices, float],
          patience: int) -> Indices | None:  # fmt: skip
    """The next plan to pay for; None if the belief keeps pointing at plans that are known."""
    root = torch.linalg.cholesky(covariance)
    for attempt in range(patience + 1):
        noise = torch.randn(len(mean), generator=generator, dtype=torch.float64)
        costs = mean if attempt == 0 else mean + root @ noise
        plan = target.fill(costs.sort(stable=True).indices.tolist())
        if plan not in known:
            return plan
    return None


@METHODS.register("linear-skip")
class LinearSkip(Searched):
    """Plans that are best under a drawn belief that losses of blocks add up; starts from block influence."""

    name = "linear-skip"
    Settings = LinearSettings

    def look(self, losses, target, session, candidates, generator) -> Found:
        batch = validation_batch(session, self.settings.rows, self.name)
        influence = block_influence(session.model, session.subject, candidates, batch)
        return linear(losses, target, generator, self.settings, influence)
