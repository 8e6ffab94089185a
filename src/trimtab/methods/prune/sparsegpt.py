"""SparseGPT (Frantar & Alistarh, ICML 2023): prune column by column, and let the columns after it make up for each
error.

    H      = X X^T + damping            of the inputs X that reach a matrix, (in, in)
    s_ij   = w_ij^2 / [H^-1]_jj         what the output loses (up to a factor) when w_ij goes and its row adapts
    go through the columns j from the left: the error e = (w_j - pruned w_j) / [C]_jj, C^T C = H^-1 (upper Cholesky
    factor), is taken from the columns behind, w_k -= e C_jk for k > j

The weights to prune are chosen for `block` columns at a time, among what the earlier columns have made of them
(Algorithm 1). Blocks of the model go in their order, each calibrated on inputs that the pruned blocks before it hand
on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy, Weight
from trimtab.methods.base import METHODS
from trimtab.methods.prune.allocations import Matrices
from trimtab.methods.prune.base import Pruner, found_masks
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.prune.evidence import Evidence, Found, collect
from trimtab.methods.prune.masks import Masks
from trimtab.methods.prune.scores import SCORES, Scores, borrowed, score
from trimtab.methods.prune.selection import largest, largest_of_each
from trimtab.methods.prune.settings import PruneSettings
from trimtab.methods.prune.settle import apart
from trimtab.settings import within

_DAMPING = 0.01


def inverse_factor(gram: Tensor, damping: float = _DAMPING) -> Tensor:
    """Upper triangular C with C^T C = (gram + damping * its mean diagonal)^-1, in double precision; all (in, in)."""
    gram = gram.double()
    mean = gram.diagonal().mean()
    damped = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (damping * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


@score("saliency", "gram", held=True)  # an inverse for each tensor
def saliency(weight: Tensor, evidence: Evidence) -> Tensor:
    """w_ij^2 / [H^-1]_jj, optimal brain surgeon's for one weight at a time."""
    factor = inverse_factor(evidence.gram)
    return (weight.double().square() / factor.square().sum(dim=0)).to(weight.dtype)


def reconstruct(weight: Tensor, gram: Tensor, count: int, block: int, damping: float,
                pattern: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Prune `count` weights of a matrix (out, in), and change the others so that its outputs on the inputs change
    little.

    Args:
        weight: the matrix.
        gram: mean of x x^T over its inputs, (in, in).
        count: how many weights go; every block of columns gives its share.
        block: columns for which the weights to prune are chosen together.
        damping: share of the gram matrix's mean diagonal that is added to its diagonal.
        pattern: (n, m): n of m columns that follow each other are kept in each row, whatever `count`. They are chosen
            when the columns before them are done; blocks are then rounded up to a multiple of m.

    Returns:
        The mask (out, in), True = kept, and the new weights, zero where it is False.
    """
    factor = inverse_factor(gram, damping)
    work = weight.double().clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    columns = work.shape[1]
    kept_of_group, group = pattern or (0, 0)
    block = -(-block // group) * group if pattern else block
    for first in range(0, columns, block):
        last = min(first + block, columns)
        if not pattern:
            # Rounded so that the shares of all blocks add up to `count`.
            goes = count * last // columns - count * first // columns
            part = work[:, first:last].square() / factor.diagonal()[first:last].square()
            mask[:, first:last] = largest(part, part.numel() - goes)
        errors = torch.zeros_like(work[:, first:last])
        for j in range(first, last):
            if pattern and j % group == 0:
                part = work[:, j : j + group].square() / factor.diagonal()[j : j + group].square()
                mask[:, j : j + group] = largest_of_each(part, group, kept_of_group)
            kept = work[:, j] * mask[:, j]
            error = (work[:, j] - kept) / factor[j, j]
            work[:, j:last] -= error[:, None] * factor[j, j:last]
            work[:, j] = kept
            errors[:, j - first] = error
        work[:, last:] -= errors @ factor[first:last, last:]
    return mask, (work * mask).to(weight.dtype)


@dataclass(frozen=True)
class SparseGPTSettings(PruneSettings):
    """Settings of SparseGPT."""

    damping: float = _DAMPING
    """Share of the inputs' mean square that is added to the diagonal of their gram matrix."""
    block_size: int = 128
    """Columns for which the weights to prune are chosen together."""
    sequential: bool = True
    """Calibrate each block on what the pruned blocks before it hand on: a pass over the data for every block."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within(vars(self), damping="(0, inf)", block_size="[1, inf)")
        if self.sequential and self.allocation in ("global", "modality", "ecoflap"):
            raise ValueError(
                f"allocation {self.allocation!r} compares the scores of all tensors, which are known one block at a "
                "time: set sequential: false, or the allocation uniform or multimodal"
            )


@METHODS.register("sparsegpt")
class SparseGPT(Pruner):
    """Column by column, what is kept makes up for what goes."""

    score = "saliency"
    allocation = "uniform"
    changes_weights = True
    Settings = SparseGPTSettings
    settings: SparseGPTSettings

    @property
    def rounds(self) -> int:
        return 2  # it goes over the data more than once

    def find(self, calibration: Calibration, sparsities: Sequence[float]) -> Iterator[Masks]:
        for sparsity in sparsities:
            weights = self.prunable(calibration)
            groups = by_block(calibration.anatomy, weights) if self.settings.sequential else [list(weights)]
            counts = self.counts(weights, weights, sparsity) if self.settings.sequential else {}
            masks: dict[Weight, Tensor] = {}
            with borrowed(calibration.plain, weights) as current:
                for group in groups:
                    settling = self.settling(
                        partial(self.between, group, current, counts, sparsity), first=group is groups[0]
                    )
                    evidence = collect(
                        calibration, group, SCORES[self.score].needs, next(calibration.rounds()), settling
                    )
                    counts = counts or self.counted(current, evidence, sparsity)
                    for weight in group:
                        masks[weight] = self.prune(current[weight], evidence.pop(weight), counts[weight])
                changed = {w: t.clone() for w, t in current.items()}
            yield found_masks(((w, masks.pop(w)) for w in weights), weights.sizes, changed)

    def counted(self, weights: Matrices, evidence: Found, sparsity: float) -> dict[Weight, int]:
        """How many weights each tensor gives by the scores of all, which are calibrated together."""
        return self.counts(Scores(SCORES[self.score], weights, evidence), weights, sparsity)

    def between(self, group: Sequence[Weight], weights: Matrices, counts: dict[Weight, int], sparsity: float,
                halves: tuple[Found, Found]) -> float:  # fmt: skip
        """How far the masks of a group are that two halves' evidence gives."""
        return apart(*(self.tried(group, weights, found, counts, sparsity) for found in halves))

    def tried(self, group: Sequence[Weight], weights: Matrices, evidence: Found, counts: dict[Weight, int],
              sparsity: float) -> Iterator[tuple[Weight, Tensor]]:  # fmt: skip
        """The masks that evidence would give the weights of a group, which stay as they are."""
        counts = counts or self.counted(weights, evidence, sparsity)
        for weight in group:
            yield weight, self.prune(weights[weight].clone(), evidence[weight], counts[weight])

    def prune(self, weight: Tensor, evidence: list[Evidence], count: int) -> Tensor:
        """Prune one matrix in place, each part of its rows on its own inputs; returns the mask."""
        masks = []
        start = 0
        for part in evidence:
            rows = weight[start : start + part.rows]
            share = count * (start + part.rows) // len(weight) - count * start // len(weight)
            settings = self.settings
            mask, new = reconstruct(rows, part.gram, share, settings.block_size, settings.damping, settings.n_of_m)
            rows.copy_(new)
            masks.append(mask)
            start += part.rows
        return torch.cat(masks)


def by_block(anatomy: Anatomy, weights: Iterable[Weight]) -> list[list[Weight]]:
    """The weights of one block after another, in the order of computation; those outside any block come first."""
    paths = [b.path for b in anatomy.blocks()]
    groups: dict[str, list[Weight]] = {path: [] for path in ("", *paths)}
    for weight in weights:
        groups[next((p for p in paths if weight.path.startswith(p + ".")), "")].append(weight)
    return [group for group in groups.values() if group]
