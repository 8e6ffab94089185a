"""Every plan there is: the oracle of small cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.methods.base import METHODS
from trimtab.methods.skip.budget import Goal, Indices
from trimtab.methods.skip.search.searched import Found, Losses, Searched, SearchedSettings


@dataclass(frozen=True)
class ExhaustiveSettings(SearchedSettings):
    """Settings of the exhaustive search."""

    limit: int = 1000
    """Most plans to try; with more of them the search refuses."""


def exhaustive(losses: Losses, goal: Goal, limit: int = 1000) -> Found:
    """The plan with the lowest loss of all. A block's score is how much better plans with it are than those without.

    Raises:
        ValueError: if there are more plans than `limit`.
    """
    if goal.number() > limit:
        raise ValueError(
            f"exhaustive: there are {goal.number():,} plans for {len(goal)} blocks, the limit is {limit:,}: raise "
            "`limit`, skip fewer blocks, or take another search"
        )
    plans = list(goal.plans())
    found = losses(plans)
    return Found(min(zip(found, plans, strict=True))[1], _scores(plans, found, len(goal)))


def _scores(plans: Sequence[Indices], losses: Sequence[float], candidates: int) -> list[float]:
    scores = []
    for i in range(candidates):
        holding = [loss for plan, loss in zip(plans, losses, strict=True) if i in plan]
        without = [loss for plan, loss in zip(plans, losses, strict=True) if i not in plan]
        both = bool(holding and without)
        scores.append(sum(without) / len(without) - sum(holding) / len(holding) if both else 0.0)
    return scores


@METHODS.register("exhaustive-skip")
class ExhaustiveSkip(Searched):
    """Every plan compared on validation rows; for a few blocks."""

    Settings = ExhaustiveSettings
    settings: ExhaustiveSettings

    def compare(self, losses, goal, session, candidates, generator) -> Found:
        return exhaustive(losses, goal, self.settings.limit)
