"""MULTIFLOW (Farina et al., CVPR 2024): prune by information flow, in shares that respect the modalities.

    a_j   = mean squared input of channel j on calibration data            (B, L, in) -> (in,)
    f_ij  = |w_ij| sqrt(a_j)                                               flow along an edge
    s_ij  = mean_j f_ij * |w_ij| * mean_i f_ij                             flow out of i, edge, flow into j
    share of a tensor = what a magnitude threshold over its modality at the target sparsity would take from it

No gradients, and nothing of the task: one mask serves every later one. Sections 3.2 and 3.3; `pruners/multiflow.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.methods.base import METHODS
from trimtab.methods.prune.base import Pruner
from trimtab.methods.prune.evidence import Evidence
from trimtab.methods.prune.rows import PIECE, single
from trimtab.methods.prune.scores import score


@score("flow", "squares", stored=True)
def flow(weight: Tensor, evidence: Evidence) -> Tensor:
    """Scores (out, in), in single precision or better, from a weight (out, in) and the mean squares of its inputs
    (in,)."""
    wide = single(weight)
    edges = wide.abs() if wide is weight else wide.abs_()  # one tensor of this size beside the weight
    edges = edges.mul_(evidence.squares.sqrt())
    flows = edges.mean(dim=1, keepdim=True), edges.mean(dim=0, keepdim=True)
    torch.mul(*flows, out=edges)
    rows = max(1, PIECE // max(edges.shape[1], 1))
    for piece, own in zip(edges.split(rows), weight.split(rows), strict=True):
        piece.mul_(own)  # of all at once, a weight in half precision would be copied whole
    return edges.abs_()


@METHODS.register("multiflow")
class Multiflow(Pruner):
    """Information-flow scores, multimodal shares."""

    score = "flow"
    allocation = "multimodal"
