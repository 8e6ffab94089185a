"""Every plan there is: the oracle of small cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.methods.base import METHODS
from trimtab.methods.skip.budget import Indices, Target
from trimtab.methods.skip.search.searched import Found, Losses, Searched, SearchedSettings


@dataclass(frozen=True)
class ExhaustiveSettings(SearchedSettings):
    """Settings of the exhaustive search."""

    limit: int = 1000
    """Most plans to try; with more of them the search refuses."""


def exhaustive(losses: Losses, target: Target, limit: int = 1000) -> Found:
    """The plan with the lowest loss of all. A block's score is how much better plans with it are than those without.

    Raises:
        ValueError: if there are more plans than `limit`.
    """
    if target.number() > limit:
        raise ValueError(
            f"exhaustive: there are {target.number():,} plans for {len(target)} blocks, the limit is {limit:,}: raise "
            "`limit`, skip fewer blocks, or take another search"
        )
    plans = list(target.plans())
    found = losses(plans)
    return Found(min(zip(found, plans, strict=True))[1], _scores(plans, found, len(target)))


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

    name = "exhaustive-skip"
    Settings = ExhaustiveSettings

    def look(self, losses, target, session, candidates, generator) -> Found:
        return exhaustive(losses, target, self.settings.limit)
