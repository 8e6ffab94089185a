"""What a search may try: prune x skip x tune, each candidate as the `methods` of a recipe.

A candidate is a sparsity, a number of skipped blocks, a way to tune with its size, and a learning rate. What is found
once serves many: masks of all sparsities come from one calibration, plans of all sizes from one search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.methods import METHODS
from trimtab.registry import unknown

ADAPTERS = "skip-adapters"
"""The way to tune in which the adapters of the skip lever are trained and nothing else."""


@dataclass(frozen=True)
class Tune:
    """A way to tune.

    Attributes:
        method: its entry in a recipe; None for the adapters that skipping sets.
        rate: learning rate at which it usually does well, of which the search tries multiples.
        head: the head's rate as a multiple.
        cached: whether it trains from the activation cache, if the recipe asks for one (`training.cache`).
    """

    method: dict[str, Any] | None
    rate: float
    head: float = 1.0
    cached: bool = False


# Sizes from small to large. The rates are those of the built-in recipes for heads and for what is added; full tuning
# and BitFit, which move pretrained weights, take smaller ones.
TUNES: dict[str, Tune] = {
    "linear-probe": Tune({"name": "linear-probe"}, 2e-3, cached=True),
    "bitfit": Tune({"name": "bitfit"}, 2e-3),
    "lora-2": Tune({"name": "lora", "rank": 2}, 3e-3, 0.7),
    "lora-8": Tune({"name": "lora", "rank": 8}, 3e-3, 0.7),
    "lora-32": Tune({"name": "lora", "rank": 32}, 3e-3, 0.7),
    "adapter-8": Tune({"name": "adapter", "bottleneck": 8}, 2e-3),
    "adapter-32": Tune({"name": "adapter", "bottleneck": 32}, 2e-3),
    "lst-8": Tune({"name": "lst", "reduction": 8}, 2e-3, cached=True),
    "unipt-4": Tune({"name": "unipt", "reduction": 4}, 2e-3, cached=True),
    "unipt-2": Tune({"name": "unipt", "reduction": 2}, 2e-3, cached=True),
    "partial": Tune({"name": "partial"}, 1e-3, cached=True),
    ADAPTERS: Tune(None, 2e-3),
    "full": Tune({"name": "full"}, 5e-4, 3.0),
}
MULTIPLES = (0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Candidate:
    """One point of the space.

    Attributes:
        sparsity: share of the prunable weights that go; 0: not pruned.
        skip: how many blocks are skipped.
        tune: name of the way to tune.
        multiple: of its usual learning rate.
    """

    sparsity: float
    skip: int
    tune: str
    multiple: float = 1.0

    @property
    def levers(self) -> str:
        """Its name without the learning rate: 'prune 50 % + skip 2 + lora-8'."""
        parts = [f"prune {100 * self.sparsity:g} %"] if self.sparsity else []
        parts += [f"skip {self.skip}"] if self.skip else []
        return " + ".join([*parts, self.tune])

    def __str__(self) -> str:
        return self.levers if self.multiple == 1 else f"{self.levers} (rate x{self.multiple:g})"


@dataclass(frozen=True)
class Space:
    """The candidates.

    Attributes:
        pruner: name of the pruner.
        sparsities: to try; without any, the lever is left alone.
        search: name of the search of plans.
        skips: numbers of blocks to try.
        tunes: ways to tune, by name.
        multiples: of the usual learning rates.
        batches: of calibration.
    """

    pruner: str = "multiflow"
    sparsities: tuple[float, ...] = (0.3, 0.5, 0.63, 0.75)
    search: str = "greedy-skip"
    skips: tuple[int, ...] = (1, 2, 3, 4)
    tunes: Mapping[str, Tune] = field(default_factory=lambda: dict(TUNES))
    multiples: tuple[float, ...] = MULTIPLES
    batches: int = 8

    def __post_init__(self) -> None:
        for name, lever in ((self.pruner, "prune"), (self.search, "skip")):
            METHODS.make(name, lever=lever)  # says which names there are
        if not self.tunes:
            raise ValueError(f"no way to tune is left: allow one of {', '.join(TUNES)}")
        if wrong := [s for s in self.sparsities if not 0 < s < 1]:
            raise ValueError(f"sparsities: expected shares between 0 and 1, found {wrong[0]}")
        if wrong := [k for k in self.skips if k < 1]:
            raise ValueError(f"skips: expected numbers of blocks of at least 1, found {wrong[0]}")

    def narrowed(self, only: Sequence[str] = (), without: Sequence[str] = ()) -> Space:
        """With levers and ways to tune pinned or left out.

        Args:
            only: what may be used: `prune`, `skip`, names of methods (`lora`) or of their sizes (`lora-8`). If it names
                no way to tune, all are allowed; if it names no lever, neither pruning nor skipping is.
            without: what may not.

        Raises:
            ValueError: if a name is unknown, or nothing is left.
        """
        known = ["prune", "skip", *dict.fromkeys(_method(n, t) for n, t in TUNES.items()), *self.tunes]
        for name in (*only, *without):
            if name not in known:
                raise ValueError(unknown("lever or way to tune", name, list(dict.fromkeys(known))))
        tunes = dict(self.tunes)
        if chosen := [n for n in only if n not in ("prune", "skip")]:
            tunes = {n: t for n, t in tunes.items() if n in chosen or _method(n, t) in chosen}
        tunes = {n: t for n, t in tunes.items() if n not in without and _method(n, t) not in without}
        prunes = "prune" not in without and (not only or "prune" in only)
        skips = "skip" not in without and (not only or "skip" in only)
        if not skips:
            tunes.pop(ADAPTERS, None)
        return Space(self.pruner, self.sparsities if prunes else (), self.search, self.skips if skips else (), tunes,
                     self.multiples, self.batches)  # fmt: skip

    def __iter__(self) -> Iterator[Candidate]:
        """Every combination of levers, the least change first, at the usual learning rates."""
        for skip in (0, *self.skips):
            for sparsity in (0.0, *self.sparsities):
                for tune in self.tunes:
                    if skip or tune != ADAPTERS:
                        yield Candidate(sparsity, skip, tune)

    def methods(self, candidate: Candidate, plans: Mapping[int, Sequence[str]] | None = None,
                masks: Mapping[float, str] | None = None) -> list[dict[str, Any]]:  # fmt: skip
        """The candidate as the `methods` of a recipe.

        Args:
            plans: skipped blocks by their number; those that are not there yet are only counted.
            masks: files of masks by sparsity; without one, the recipe calibrates for itself.
        """
        c, out = candidate, []
        if c.sparsity:
            entry: dict[str, Any] = {"name": self.pruner, "sparsity": c.sparsity, "batches": self.batches}
            out.append(entry | ({"masks": masks[c.sparsity]} if masks and c.sparsity in masks else {}))
        if c.skip:
            form = "parallel" if c.tune == ADAPTERS else "none"
            # The search has been paid for: a plan that is known is skipped by name.
            which = {"plan": list(plans[c.skip])} if plans and c.skip in plans else {"skip": c.skip}
            out.append({"name": self.search, **which, "adapters": form})
        method = self.tunes[c.tune].method
        return [*out, *([dict(method)] if method else [])]


def _method(name: str, tune: Tune) -> str:
    return tune.method["name"] if tune.method else name
