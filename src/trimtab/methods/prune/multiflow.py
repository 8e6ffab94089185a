"""MULTIFLOW (Farina et al., CVPR 2024): prune by information flow, in shares that respect the modalities.

    a_j   = mean squared input of channel j on calibration data            (B, L, in) -> (in,)
    f_ij  = |w_ij| sqrt(a_j)                                               flow along an edge
    s_ij  = mean_j f_ij * |w_ij| * mean_i f_ij                             flow out of i, edge, flow into j
    share of a tensor = what a magnitude threshold over its modality at the target sparsity would take from it

No gradients, and nothing of the task: one mask serves every later one. Sections 3.2 and 3.3; `pruners/multiflow.py`.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from trimtab.anatomy import Weight
from trimtab.methods.base import METHODS
from trimtab.methods.prune.base import Pruner, smallest


def flow(weight: Tensor, statistic: Tensor | None) -> Tensor:
    """Scores (out, in) from a weight (out, in) and the mean squares of its inputs (in,)."""
    edges = weight.abs() * statistic.sqrt()
    return edges.mean(dim=1, keepdim=True) * edges.mean(dim=0, keepdim=True) * weight.abs()


def by_modality(weights: dict[Weight, Tensor], sparsity: float) -> dict[Weight, float]:
    """Sparsity of each tensor under one magnitude threshold per modality, so that none is emptied for another."""
    groups: dict[str, list[Weight]] = defaultdict(list)
    for weight in weights:
        groups[weight.modality].append(weight)
    shares = {}
    for members in groups.values():
        magnitudes = torch.cat([weights[w].abs().flatten() for w in members])
        kept = smallest(magnitudes, int(magnitudes.numel() * sparsity)).split([weights[w].numel() for w in members])
        shares |= {w: 1 - int(k.sum()) / k.numel() for w, k in zip(members, kept, strict=True)}
    return shares


@METHODS.register("multiflow")
class Multiflow(Pruner):
    """Information-flow scores, multimodal shares."""

    name = "multiflow"
    needs_statistics = True
    score = staticmethod(flow)
    allocate = staticmethod(by_modality)
