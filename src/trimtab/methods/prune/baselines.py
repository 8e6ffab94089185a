"""The plainest pruners, as yardsticks: magnitude and chance."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.anatomy import Weight
from trimtab.methods.base import METHODS
from trimtab.methods.prune.base import Pruner, smallest


def magnitude(weight: Tensor, statistic: Tensor | None) -> Tensor:
    """|w|, the oldest score."""
    return weight.abs()


def chance(weight: Tensor, statistic: Tensor | None) -> Tensor:
    """Uniform random scores, from torch's global generator."""
    return torch.rand(weight.shape).to(weight.device)


def uniform(weights: dict[Weight, Tensor], sparsity: float) -> dict[Weight, float]:
    """Every tensor gives the same share."""
    return dict.fromkeys(weights, sparsity)


def global_magnitude(weights: dict[Weight, Tensor], sparsity: float) -> dict[Weight, float]:
    """What one magnitude threshold over all tensors takes from each."""
    magnitudes = torch.cat([w.abs().flatten() for w in weights.values()])
    kept = smallest(magnitudes, int(magnitudes.numel() * sparsity)).split([w.numel() for w in weights.values()])
    return {w: 1 - int(k.sum()) / k.numel() for w, k in zip(weights, kept, strict=True)}


@METHODS.register("omp")
class OMP(Pruner):
    """One-shot magnitude pruning: the smallest |w| of the whole model go."""

    name = "omp"
    score = staticmethod(magnitude)
    allocate = staticmethod(global_magnitude)


@METHODS.register("random-pruning")
class RandomPruning(Pruner):
    """The same share of every tensor, at random."""

    name = "random-pruning"
    score = staticmethod(chance)
    allocate = staticmethod(uniform)
