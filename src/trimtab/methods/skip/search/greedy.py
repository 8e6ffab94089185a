"""Greedy skipping: again and again the block that is missed least, given those that are skipped already."""

from __future__ import annotations

from typing import Any

from trimtab.methods.base import METHODS
from trimtab.methods.skip.budget import Goal, Indices
from trimtab.methods.skip.search.searched import Found, Losses, Searched


def greedy(losses: Losses, goal: Goal) -> Found:
    """n + (n - 1) + ... evaluations for n candidates. The score of a block is how early it was skipped."""
    plan: list[int] = []
    scores = [0.0] * len(goal)
    trace: list[dict[str, Any]] = []
    while not goal.enough(plan):
        left = [i for i in range(len(goal)) if i not in plan]
        tried: list[Indices] = [tuple(sorted([*plan, i])) for i in left]
        found = losses(tried)
        best = min(range(len(left)), key=lambda j: (found[j], j))
        plan.append(left[best])
        scores[left[best]] = float(len(goal) - len(plan) + 1)
        trace.append({"step": len(plan), "subsets": [list(t) for t in tried], "losses": found, "gates": list(scores)})
    return Found(goal.fill(plan), scores, trace)


@METHODS.register("greedy-skip")
class GreedySkip(Searched):
    """Blocks taken one by one, each time the one that is missed least on validation rows."""

    def compare(self, losses, goal, session, candidates, generator) -> Found:
        return greedy(losses, goal)
