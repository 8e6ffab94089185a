"""Allocation: how many weights each tensor gives, from scores, weights and the sparsity asked for.

    allocate(scores, weights, sparsity) -> number of weights that each tensor gives, by weight

Both arguments are mappings over the same prunable matrices (out, in) in the order of the anatomy. Their matrices may be
made anew by every look at them (`made.Made`), so that one is in memory at a time: `sizes` tells their numbers without.
A threshold over several tensors is the k-th smallest score of them all, k = int(sparsity * their number), and exactly k
weights go: of those that equal it the smaller ones (`selection.below`). The published pruners let all of these go.
Adding an allocation is one function with `@ALLOCATIONS.register(name)`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from trimtab.anatomy import Weight
from trimtab.methods.prune.made import Listed, Magnitudes, sizes
from trimtab.methods.prune.selection import below
from trimtab.registry import Registry

Matrices = Mapping[Weight, Tensor]
Allocation = Callable[[Matrices, Matrices, float], dict[Weight, int]]
ALLOCATIONS: Registry[Allocation] = Registry("allocation")


def threshold(
    scores: Matrices, weights: Matrices | None, sparsity: float, members: Sequence[Weight]
) -> dict[Weight, int]:
    """What one threshold takes from each of some tensors; `weights` tell equal scores apart."""
    known = sizes(scores)
    count = int(sum(known[w] for w in members) * sparsity)
    given = below(Listed(scores, members), count, None if weights is None else Listed(weights, members))
    return dict(zip(members, given, strict=True))


def by_modality(scores: Matrices, weights: Matrices | None, sparsity: float) -> dict[Weight, int]:
    """What one threshold per modality takes from each tensor."""
    counts: dict[Weight, int] = {}
    for members in _modalities(scores):
        counts |= threshold(scores, weights, sparsity, members)
    return counts


def _modalities(weights: Iterable[Weight]) -> Iterable[list[Weight]]:
    groups: dict[str, list[Weight]] = defaultdict(list)
    for weight in weights:
        groups[weight.modality].append(weight)
    return groups.values()


@ALLOCATIONS.register("uniform")
def uniform(scores: Matrices, weights: Matrices, sparsity: float) -> dict[Weight, int]:
    """Every tensor gives the same share."""
    return {w: int(n * sparsity) for w, n in sizes(scores).items()}


@ALLOCATIONS.register("global")
def everywhere(scores: Matrices, weights: Matrices, sparsity: float) -> dict[Weight, int]:
    """One threshold on the scores of all tensors. It may empty a modality whose scores are smaller than another's."""
    return threshold(scores, weights, sparsity, list(scores))


@ALLOCATIONS.register("modality")
def modality(scores: Matrices, weights: Matrices, sparsity: float) -> dict[Weight, int]:
    """One threshold on the scores of each modality."""
    return by_modality(scores, weights, sparsity)


@ALLOCATIONS.register("multimodal")
def multimodal(scores: Matrices, weights: Matrices, sparsity: float) -> dict[Weight, int]:
    """MULTIFLOW's prior (section 3.3): a tensor gives the share that a magnitude threshold over its modality would
    take.

    The share is a quotient and its product with the size is cut to an integer, as the published code does: where that
    is not exact, a tensor keeps one weight more than the threshold would leave.
    """
    counts = by_modality(Magnitudes(weights), None, sparsity)  # weights tell no equal magnitudes apart
    known = sizes(weights)
    return {w: int((1 - (n - count) / n) * n) for w, count in counts.items() for n in [known[w]]}


@ALLOCATIONS.register("ecoflap")
def ecoflap(scores: Matrices, weights: Matrices, sparsity: float, slack: float = 0.1) -> dict[Weight, int]:
    """After ECoFLaP (Sung et al., ICLR 2024): what is kept is shared out by the tensors' importance.

    Every tensor keeps at least 1 - (sparsity + slack) of its weights, so that none collapses; the rest of the budget
    goes to the tensors in proportion to the sum of their scores, up to all of their weights. Deviation: the paper
    estimates the importance by zeroth-order gradients of the loss, here it is the sum of the very scores that choose
    the weights.
    """
    known = sizes(scores)
    importance = {w: float(s.double().sum()) for w, s in scores.items()}
    kept = {w: n * max(0.0, 1 - sparsity - slack) for w, n in known.items()}
    budget = sum(n - int(n * sparsity) for n in known.values())
    while (rest := budget - sum(kept.values())) > 0.5:  # once, and again for each time that tensors are full
        open_ = [w for w in known if kept[w] < known[w]]
        claims = importance if any(importance[w] > 0 for w in open_) else known
        total = sum(claims[w] for w in open_)
        for w in open_:
            kept[w] = min(known[w], kept[w] + rest * claims[w] / total)
    return {w: n - min(n, round(kept[w])) for w, n in known.items()}


def floored(counts: Mapping[Weight, int], known: Mapping[Weight, int], floor: float) -> dict[Weight, int]:
    """Counts under which every tensor keeps at least a share of its weights.

    What a tensor keeps more for it, the others of its modality give, each in proportion to what it keeps above the
    floor; where a modality has too little of that (a global threshold took most of it), the others do.

    Args:
        counts: number of weights that each tensor gives.
        known: number of weights that it has.
        floor: the least share that it keeps, to within one weight, at most what all keep together.

    Returns:
        Counts with the same sum.

    Raises:
        ValueError: if less than the floor is kept of all tensors together.
    """
    most = {w: n - math.ceil(floor * n - 1e-9) for w, n in known.items()}
    excess = sum(counts.values()) - sum(most.values())
    for w, n in known.items():  # a floor that is all that is kept: rounded up in every tensor it would be more
        if excess > 0 and n - most[w] > floor * n:
            most[w], excess = most[w] + 1, excess - 1
    if excess > 0:
        kept = 1 - sum(counts.values()) / sum(known.values())
        raise ValueError(f"floor: expected at most the share of all weights that is kept, {kept:.4g}, found {floor}")
    given = {w: min(counts[w], most[w]) for w in known}
    for members in (*_modalities(known), list(known)):
        room = {w: most[w] - given[w] for w in members}
        total, before = sum(room.values()), 0
        missing = min(total, sum(counts[w] - given[w] for w in members))
        for w in members if missing else ():  # as integers that add up
            given[w] += missing * (before + room[w]) // total - missing * before // total
            before += room[w]
    return given
