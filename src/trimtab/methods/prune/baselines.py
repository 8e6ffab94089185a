"""Pruners that need nothing but the weights: magnitude in its forms, and chance.

    omp            |w|                                        one threshold over the model
    local-mp       |w|                                        the same share of every tensor
    modality-mp    |w|                                        one threshold a modality
    l2             |w| / ||W||_2                              one threshold over the model
    lamp           w^2 / sum of the w'^2 with w'^2 >= w^2     one threshold over the model
    random-pruning                                            the same share of every tensor

A tensor is one matrix here; what an allocation does with the scores is in allocations.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.methods.base import METHODS
from trimtab.methods.prune.base import Pruner
from trimtab.methods.prune.evidence import Evidence
from trimtab.methods.prune.scores import score


@score("magnitude")
def magnitude(weight: Tensor, evidence: Evidence) -> Tensor:
    """|w|, the oldest score."""
    return weight.abs()


@score("chance", drawn=True)
def chance(weight: Tensor, evidence: Evidence) -> Tensor:
    """Uniform random scores, from torch's global generator."""
    return torch.rand(weight.shape).to(weight.device)


@score("l2")
def l2(weight: Tensor, evidence: Evidence) -> Tensor:
    """|w| over the norm of its matrix, so that matrices of different scales can be compared."""
    return weight.abs() / weight.norm().clamp_min(torch.finfo(weight.dtype).tiny)


@score("lamp", held=True)  # a sort of each tensor
def lamp(weight: Tensor, evidence: Evidence) -> Tensor:
    """LAMP (Lee et al., ICLR 2021): w^2 over the sum of all squares in its matrix that are at least as large.

    The largest weight of a matrix has the score 1, so that a global threshold below 1 empties none. The sums are made
    from the largest square down in double precision: taking each from the total, as published code does, cancels
    digits.
    """
    squares = weight.double().square().flatten()
    ordered, order = squares.sort(descending=True, stable=True)
    at_least = ordered.cumsum(0)
    scores = torch.empty_like(squares)
    scores[order] = ordered / at_least.clamp_min(torch.finfo(torch.float64).tiny)
    return scores.to(weight.dtype).view_as(weight)


@METHODS.register("omp")
class OMP(Pruner):
    """One-shot magnitude pruning: the smallest |w| of the whole model go."""

    score = "magnitude"
    allocation = "global"


@METHODS.register("local-mp")
class LocalMP(Pruner):
    """Magnitude within each tensor: the same share of every one."""

    score = "magnitude"
    allocation = "uniform"


@METHODS.register("modality-mp")
class ModalityMP(Pruner):
    """Magnitude within each modality: the smallest |w| of all vision weights go, of all text weights, of all fusion
    ones."""

    score = "magnitude"
    allocation = "modality"


@METHODS.register("l2")
class LayerwiseL2(Pruner):
    """Magnitude relative to the tensor's norm, over the whole model."""

    score = "l2"
    allocation = "global"


@METHODS.register("lamp")
class LAMP(Pruner):
    """Layer-adaptive magnitude: each weight against the larger ones of its tensor, over the whole model."""

    score = "lamp"
    allocation = "global"


@METHODS.register("random-pruning")
class RandomPruning(Pruner):
    """The same share of every tensor, at random."""

    score = "chance"
    allocation = "uniform"
