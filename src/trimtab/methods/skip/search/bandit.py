"""Our search: a policy gradient that is right for draws without replacement.

    policy     Plackett-Luce: block after block is drawn in proportion to exp(theta_i) among those not drawn yet
               log P(draw a_1 .. a_k) = sum over t of theta_{a_t} - logsumexp(theta of what is left before t)
    update     theta += rate * mean over draws s of A_s * d log P(s) / d theta,
               A_s = (R_s - mean of the other draws' R) / spread of all rewards so far,   R = -loss

What differs from DAS, and why:

1. DAS multiplies by p_i (1 - p_i), the slope of independent coin tosses, though its draws are without replacement: a
   block that is drawn because others are taken already gets the same credit. Here the gradient is that of the draw.
2. DAS compares its plans on a batch that changes at every update, so that what is learned is mostly which batch was
   easy. Here all plans are compared on the same rows with the same random numbers: a plan is paid for once.
3. theta starts from block influence (see `influence.py`): DAS starts from nothing.
4. Rewards are -loss in units of their own spread; exp(-loss) is nearly flat where the loss is large.
5. The search stops when the policy's favourite plan has not changed for `patience` updates, and answers the best plan
   that it has paid for: nothing is lost by asking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from trimtab.methods.base import METHODS
from trimtab.methods.skip.budget import Goal, Indices
from trimtab.methods.skip.search.influence import block_influence, costs_at_first
from trimtab.methods.skip.search.searched import Found, Losses, Searched, SearchedSettings
from trimtab.settings import within


@dataclass(frozen=True)
class BanditSettings(SearchedSettings):
    """Settings of the bandit."""

    evaluations: int = 60
    """Most plans to pay for."""
    draws: int = 4
    """Plans drawn for an update."""
    rate: float = 1.0
    """Step of theta for a plan that is better than the others by one spread."""
    prior: float = 1.0
    """Spread of theta at the start, from block influence; 0 starts even."""
    patience: int = 8
    """Updates with the same favourite plan after which the search stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(vars(self), draws="[2, inf)", evaluations=f"[{self.draws}, inf)", patience="[1, inf)", prior="[0, inf)")


def log_probability(theta: Tensor, order: Sequence[int]) -> Tensor:
    """Log probability under Plackett-Luce that the first draws are `order`, a scalar."""
    left = list(range(len(theta)))
    total = theta.new_zeros(())
    for i in order:
        total = total + theta[i] - theta[left].logsumexp(0)
        left.remove(i)
    return total


def log_probability_of_set(theta: Tensor, plan: Sequence[int], most: int = 4) -> Tensor:
    """Log probability that the first draws are a set, in any order; of its first order alone if it is larger than
    `most`, whose gradient has the same mean and more noise."""
    if len(plan) > most:
        return log_probability(theta, plan)
    return torch.stack([log_probability(theta, order) for order in permutations(plan)]).logsumexp(0)


def bandit(losses: Losses, goal: Goal, generator: torch.Generator, settings: BanditSettings,
           influence: Sequence[float] | None = None) -> Found:  # fmt: skip
    """Search with a Plackett-Luce policy.

    Args:
        losses: of plans; asked twice for one, it pays once.
        goal: what a plan must save.
        generator: of the draws.
        influence: of each candidate, for the prior; None starts even.
    """
    theta = -settings.prior * costs_at_first(influence, len(goal))
    known: dict[Indices, float] = {}
    trace: list[dict[str, Any]] = []
    favourite, same = goal.fill(_descending(theta)), 0
    while same < settings.patience:
        orders = _draw(theta, goal, generator, settings, known)
        plans = [tuple(sorted(o)) for o in orders]
        if not trace:
            plans[0], orders[0] = favourite, favourite  # the prior's own answer is worth knowing
        known |= dict(zip(plans, losses(plans), strict=True))
        theta = _step(theta, orders, [known[p] for p in plans], list(known.values()), settings.rate)
        trace.append({"step": len(trace) + 1, "subsets": [list(p) for p in plans], "losses": [known[p] for p in plans],
                      "gates": [round(t, 6) for t in theta.tolist()]})  # fmt: skip
        now = goal.fill(_descending(theta))
        same = same + 1 if now == favourite else 0
        favourite = now
        if len(known) >= settings.evaluations:
            break
    if favourite not in known and len(known) < settings.evaluations:
        known[favourite] = losses([favourite])[0]
    return Found(min(known, key=lambda p: (known[p], p)), theta.tolist(), trace)


def _draw(theta: Tensor, goal: Goal, generator: torch.Generator, settings: BanditSettings,
          known: dict[Indices, float]) -> list[Indices]:  # fmt: skip
    """Draws of an update, independent of each other: repeats are right, and cost nothing.

    An update that would pay for nothing draws again, a few times, for the policy may be sure of itself.
    """
    room = settings.evaluations - len(known)
    for _ in range(8):
        orders: list[Indices] = []
        while len(orders) < settings.draws:
            noise = -torch.empty_like(theta).exponential_(generator=generator).log()  # Gumbel: argsort is the draw
            orders.append(_in_order(goal, _descending(theta + noise)))
        fresh = {tuple(sorted(o)) for o in orders} - known.keys()
        if fresh:
            break
    affordable: list[Indices] = []
    paid: set[Indices] = set()
    for order in orders:
        plan = tuple(sorted(order))
        if plan not in known and plan not in paid and len(paid) >= room:
            continue
        paid |= {plan} - known.keys()
        affordable.append(order)
    return affordable


def _in_order(goal: Goal, order: list[int]) -> Indices:
    """The plan of an order of preference, in that order."""
    plan = set(goal.fill(order))
    return tuple(i for i in order if i in plan)


def _descending(values: Tensor) -> list[int]:
    return values.sort(descending=True, stable=True).indices.tolist()


def _step(theta: Tensor, orders: Sequence[Indices], found: Sequence[float], known: Sequence[float],
          rate: float) -> Tensor:  # fmt: skip
    """One step up the gradient of the expected reward."""
    rewards = -torch.tensor(found, dtype=torch.float64)
    spread = torch.tensor(known, dtype=torch.float64).std().clamp(min=1e-9) if len(known) > 1 else torch.tensor(1.0)
    count = len(rewards)
    others = (rewards.sum() - rewards) / max(count - 1, 1)  # each draw is judged against the rest, which is unbiased
    advantages = (rewards - others) / spread
    parameter = theta.clone().requires_grad_(True)
    total = sum(a * log_probability_of_set(parameter, o) for a, o in zip(advantages, orders, strict=True)) / count
    (slope,) = torch.autograd.grad(total, parameter)
    return theta + rate * slope


@METHODS.register("bandit-skip")
class BanditSkip(Searched):
    """Plans drawn by a Plackett-Luce policy that starts from block influence; stops when its favourite is settled."""

    Settings = BanditSettings
    settings: BanditSettings

    def compare(self, losses, goal, session, candidates, generator) -> Found:
        batch = next(session.batches("validation", self.settings.rows))
        influence = block_influence(session.with_task, session.plain, candidates, batch)
        return bandit(losses, goal, generator, self.settings, influence)
