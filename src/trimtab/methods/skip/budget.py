"""How much must go: a number of blocks, or a share of the model's MACs, parameters or latency.

A plan is a set of candidate blocks, named by their indices. It is *enough* if what it saves reaches the goal, and
*minimal* if no block of it could stay. Searches look among minimal plans that are enough; with a number k of blocks
these are the sets of k.

What a block costs is counted on the session's example (one sample in recipes, the first training batch of data of one's
own), in two passes of the model with its adapters: one in which no candidate is skipped and one in which all are. A
plan's model then costs what the first pass cost, less kept - skipped for each of its blocks: exact for MACs and
parameters, and for latency as good as times measured inside one pass add up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb
from typing import Any, Literal

from torch import nn

from trimtab.counting import count_inside, time_inside
from trimtab.methods.fitting import evaluating
from trimtab.methods.skip.plan import Plan
from trimtab.methods.skip.skipped import Switch

Unit = Literal["blocks", "macs", "params", "latency"]
Indices = tuple[int, ...]


@dataclass(frozen=True)
class Goal:
    """What a plan must save: so much in all, of what skipping each candidate saves.

    Attributes:
        savings: what skipping each candidate saves, in `unit`.
        needed: how much must be saved in all.
        unit: of both; `latency` is in milliseconds.
    """

    savings: tuple[float, ...]
    needed: float
    unit: Unit = "blocks"

    @classmethod
    def count(cls, candidates: int, skip: int) -> Goal:
        """Any `skip` of the candidates."""
        return cls((1.0,) * candidates, float(skip))

    def __len__(self) -> int:
        return len(self.savings)

    def enough(self, plan: Iterable[int]) -> bool:
        return sum(self.savings[i] for i in plan) >= self.needed - 1e-9 * abs(self.needed)

    def fill(self, order: Sequence[int]) -> Indices:
        """The minimal plan that an order of preference leads to: blocks are taken until it is enough, then those that
        were taken last but turn out not to be needed are given back."""
        taken: list[int] = []
        for i in order:
            if self.enough(taken):
                break
            taken.append(i)
        for i in reversed(taken[:-1]):
            if self.enough([j for j in taken if j != i]):
                taken.remove(i)
        return tuple(sorted(taken))

    def sizes(self) -> range:
        """How many blocks a plan may have. A block that saves nothing is in no minimal plan."""
        dear = sorted((s for s in self.savings if s > 0), reverse=True)
        most = next(k for k in range(len(dear) + 1) if sum(dear[-k:] if k else ()) >= self.needed - 1e-9)
        least = next(k for k in range(len(dear) + 1) if sum(dear[:k]) >= self.needed - 1e-9)
        return range(least, most + 1)

    def number(self) -> int:
        """How many plans there can be at most."""
        return sum(comb(len(self), k) for k in self.sizes())

    def plans(self) -> Iterator[Indices]:
        """Every minimal plan, by size and then in order of its indices."""
        for size in self.sizes():
            for plan in combinations(range(len(self)), size):
                if self.enough(plan) and not any(self.enough([j for j in plan if j != i]) for i in plan):
                    yield plan


def parse(budget: str) -> tuple[float, Unit]:
    """`30% macs` -> (0.3, "macs").

    Raises:
        ValueError: if it is not a percentage between 0 and 100 of `macs`, `params` or `latency`.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*%\s*(?:fewer\s+|less\s+)?(macs|params|latency)\s*", budget.lower())
    if match is None or not 0 < float(match[1]) < 100:
        raise ValueError(
            f"budget: expected how much less of what: '30% macs', '20% params' or '25% latency', found {budget!r}"
        )
    return float(match[1]) / 100, match[2]  # type: ignore[return-value]


@dataclass(frozen=True)
class BlockCosts:
    """What candidates cost in one unit.

    Attributes:
        dense: the whole model before any method, with the sum over blocks.
        total: the whole model with adapters in every block.
        blocks: each candidate alone, as it came.
        kept: each with its adapters.
        skipped: what stands in its place.
    """

    unit: Unit
    dense: float
    total: float
    blocks: tuple[float, ...]
    kept: tuple[float, ...]
    skipped: tuple[float, ...]

    @property
    def savings(self) -> tuple[float, ...]:
        return tuple(k - s for k, s in zip(self.kept, self.skipped, strict=True))

    def of(self, plan: Iterable[int]) -> float:
        """The whole model with a plan applied."""
        savings = self.savings
        return self.total - sum(savings[i] for i in plan)

    def goal(self, share: float) -> Goal:
        """At least `share` less than the dense model, adapters included.

        Raises:
            ValueError: if that cannot be reached while one candidate stays.
        """
        needed = self.total - (1 - share) * self.dense
        useful = [s for s in self.savings if s > 0]
        most = sum(useful) - (min(self.savings) if len(useful) == len(self.savings) else 0)
        if needed > most:
            possible = 1 - (self.total - most) / self.dense
            raise ValueError(
                f"budget: {100 * share:g}% {self.unit} cannot be saved by skipping: while one of "
                f"{len(self.kept)} blocks stays it is at most {100 * possible:.1f}%"
            )
        return Goal(self.savings, needed, self.unit)


def measure(unit: Unit, dense: tuple[nn.Module, list[nn.Module], Callable[[], Any]],
            supernet: tuple[nn.Module, list[Switch], Callable[[], Any]]) -> BlockCosts:  # fmt: skip
    """Costs of blocks.

    Args:
        unit: `macs`, `params` or `latency`.
        dense: the model as it came, its candidate blocks, and a call that runs it once.
        supernet: the same with adapters and switches in it.
    """
    model, blocks, call = dense
    whole, switches, run = supernet
    if unit == "params":
        kept = tuple(_size(s.block) for s in switches)
        skipped = tuple(_size(s.replacement) for s in switches)
        return BlockCosts(unit, _size(model), _size(whole) - sum(skipped), tuple(map(_size, blocks)), kept, skipped)
    count: Any = count_inside if unit == "macs" else time_inside
    found = []
    was = [s.skip for s in switches]
    # Counting follows gradients through modules; a trained table that is a module's input (MDETR's queries) stops it.
    trained = [p for m in (model, whole) for p in m.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        with evaluating(model), evaluating(whole):
            found.append(count(blocks, call))
            for skip in (False, True):
                for s in switches:
                    s.skip = skip
                found.append(count(switches, run))
    finally:
        for s, skip in zip(switches, was, strict=True):
            s.skip = skip
        for p in trained:
            p.requires_grad_(True)
    (total, each), (total_kept, kept), (_, skipped) = found
    return BlockCosts(unit, total, total_kept, tuple(each), tuple(kept), tuple(skipped))


def _size(module: nn.Module) -> float:
    return float(sum(p.numel() for p in module.parameters()))


def with_costs(plan: Plan, macs: BlockCosts) -> Plan:
    """The plan with the MACs of its blocks, what skipping each saves, and those of the whole model before and after.

    Args:
        plan: of the candidates that were measured, in the same order.
        macs: what they cost, in MACs.
    """
    known = tuple(
        replace(b, macs=int(each), saved=int(saved))
        for b, each, saved in zip(plan.blocks, macs.blocks, macs.savings, strict=True)
    )
    chosen = [i for i, b in enumerate(plan.blocks) if b.skipped]
    return replace(plan, blocks=known, dense_macs=int(macs.dense), macs=int(macs.of(chosen)))
