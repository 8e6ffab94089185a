"""How much must go: a number of blocks, or a share of the model's MACs, parameters or latency.

A plan is a set of candidate blocks, named by their indices. It is *enough* if what it saves reaches the target, and
*minimal* if no block of it could stay. Searches look among minimal plans that are enough; with a number k of blocks
these are the sets of k.

What a block costs is counted in two passes of the model with its adapters: one in which no candidate is skipped and one
in which all are. A plan's model then costs what the first pass cost, less kept - skipped for each of its blocks: exact
for MACs and parameters, and for latency as good as times measured inside one pass add up.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any, Literal

import torch
from torch import nn

from trimtab.methods.skip.adapters import Switch

Unit = Literal["blocks", "macs", "params", "latency"]
Indices = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """What a plan must save.

    Attributes:
        savings: what skipping each candidate saves, in `unit`.
        needed: how much must be saved in all.
        unit: of both; `latency` is in milliseconds.
    """

    savings: tuple[float, ...]
    needed: float
    unit: Unit = "blocks"

    @classmethod
    def count(cls, candidates: int, skip: int) -> Target:
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
        """How many blocks a plan may have."""
        dear = sorted(self.savings, reverse=True)
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

    def target(self, share: float) -> Target:
        """At least `share` less than the dense model, adapters included.

        Raises:
            ValueError: if that cannot be reached while one candidate stays.
        """
        needed = self.total - (1 - share) * self.dense
        most = sum(self.savings) - min(self.savings)
        if needed > most:
            possible = 1 - (self.total - most) / self.dense
            raise ValueError(
                f"budget: {100 * share:g}% {self.unit} cannot be saved by skipping: with all but one of "
                f"{len(self.kept)} blocks skipped it is {100 * possible:.1f}%"
            )
        return Target(self.savings, needed, self.unit)


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
        size: Callable[[nn.Module], float] = lambda m: float(sum(p.numel() for p in m.parameters()))  # noqa: E731
        kept = tuple(size(s.block) for s in switches)
        skipped = tuple(size(s.replacement) for s in switches)
        return BlockCosts(unit, size(model), size(whole) - sum(skipped), tuple(map(size, blocks)), kept, skipped)
    count = _macs if unit == "macs" else _milliseconds
    found = []
    was = [s.skip for s in switches]
    training = model.training, whole.training
    # Counting follows gradients through modules; a trained table that is a module's input (MDETR's queries) stops it.
    trained = [p for m in (model, whole) for p in m.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    model.eval(), whole.eval()
    try:
        found.append(count(blocks, call))
        for skip in (False, True):
            for s in switches:
                s.skip = skip
            found.append(count(switches, run))
    finally:
        for s, skip in zip(switches, was, strict=True):
            s.skip = skip
        model.train(training[0]), whole.train(training[1])
        for p in trained:
            p.requires_grad_(True)
    (total, each), (total_kept, kept), (_, skipped) = found
    return BlockCosts(unit, total, total_kept, tuple(each), tuple(kept), tuple(skipped))


def _macs(modules: Sequence[nn.Module], call: Callable[[], Any]) -> tuple[float, list[float]]:
    """MACs of a call, and those inside each module."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        inside = _inside(modules, counter.get_total_flops, call)
    return counter.get_total_flops() / 2, [x / 2 for x in inside]


def _milliseconds(
    modules: Sequence[nn.Module], call: Callable[[], Any], repeats: int = 15
) -> tuple[float, list[float]]:
    """Milliseconds of a call and of each module in it: medians after 3 calls that do not count."""

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() * 1000

    whole, parts = [], []
    with torch.no_grad():
        for repeat in range(repeats + 3):
            start = now()
            inside = _inside(modules, now, call)
            if repeat >= 3:
                whole.append(now() - start)
                parts.append(inside)
    return statistics.median(whole), [statistics.median(column) for column in zip(*parts, strict=True)]


def _inside(modules: Sequence[nn.Module], clock: Callable[[], float], call: Callable[[], Any]) -> list[float]:
    """How far a clock moves inside each module during one call."""
    moved = [0.0] * len(modules)
    started = [0.0] * len(modules)
    handles = []
    for i, module in enumerate(modules):

        def before(*_: Any, i: int = i) -> None:
            started[i] = clock()

        def after(*_: Any, i: int = i) -> None:
            moved[i] += clock() - started[i]

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return moved
