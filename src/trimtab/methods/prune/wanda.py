"""Pruners made for language models: one pass over inputs, no gradients.

    Wanda   |w_ij| ||x_j||                                                Sun et al., ICLR 2024, eq. 1
    RIA     (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) ||x_j||^a     Zhang et al., ICLR 2024, a = 1/2

||x_j|| is the norm of channel j over all calibration tokens; here the root of its mean square, another constant factor.
Wanda compares the weights of one output with each other, RIA those of a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.methods.base import METHODS
from trimtab.methods.prune.base import Pruner
from trimtab.methods.prune.evidence import Evidence
from trimtab.methods.prune.scores import score
from trimtab.methods.prune.selection import going, smallest
from trimtab.methods.prune.settings import PruneSettings


@score("wanda", "squares")
def wanda(weight: Tensor, evidence: Evidence) -> Tensor:
    """|w_ij| ||x_j||: the size of the term that a weight adds to its output."""
    return weight.abs().mul_(evidence.squares.sqrt())


@score("ria", "squares")
def ria(weight: Tensor, evidence: Evidence) -> Tensor:
    """A weight's share of what its input gives and of what its output gets, times the root of the input's norm."""
    size = weight.abs()
    tiny = torch.finfo(weight.dtype).tiny
    shares = size / size.sum(dim=0, keepdim=True).clamp_min(tiny)
    shares += size.div_(size.sum(dim=1, keepdim=True).clamp_min(tiny))
    return shares.mul_(evidence.squares.sqrt().sqrt())


@dataclass(frozen=True)
class WandaSettings(PruneSettings):
    """Settings of Wanda and RIA."""

    per_output: bool = True
    """Whether every output gives as many of its weights (to within one); otherwise a tensor's weights are compared."""


class RowPruner(Pruner):
    """A pruner that may compare the weights of one output only with each other."""

    Settings = WandaSettings
    settings: WandaSettings

    def remove(self, scores: Tensor, count: int, weight: Tensor) -> Tensor:
        if not self.settings.per_output:
            return smallest(scores, count, weight)
        each, rest = divmod(count, len(scores))  # weights that every output gives, and how many outputs give one more
        sizes = weight.abs()
        order = going(scores, sizes)
        mask = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :each], False)
        if rest:
            next_to_go = order[:, each : each + 1]
            more = going(scores.gather(1, next_to_go)[:, 0], sizes.gather(1, next_to_go)[:, 0])[:rest]
            mask[more, order[more, each]] = False
        return mask


@METHODS.register("wanda")
class Wanda(RowPruner):
    """Weight times input norm, the same share of every output."""

    score = "wanda"
    allocation = "uniform"


@dataclass(frozen=True)
class RIASettings(WandaSettings):
    """Settings of RIA."""

    per_output: bool = False
    """Whether every output gives as many of its weights (to within one); otherwise a tensor's weights are compared."""


@METHODS.register("ria")
class RIA(RowPruner):
    """Relative importance and activations: shares of input and output, times the root of the input norm."""

    score = "ria"
    allocation = "uniform"
    Settings = RIASettings
    settings: RIASettings
