"""TAMT (Liu et al., NAACL 2022): learn the masks of frozen weights on the loss that the model was pretrained with.

    V     = alpha * t * [|w| >= t_layer]      t, t_layer: the magnitude thresholds of the model and of the tensor
    mask  = [|V| > k-th smallest of |V|]      anew before every step; the model computes with w * mask
    dV    = dL/d(w * mask) * w * sign(V)      straight through the threshold

AdamW with a linearly falling learning rate moves V; the last threshold gives the mask. A weight with V = 0 gets no
gradient, so that the result is nearly a choice among the weights that magnitude keeps in each tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.anatomy import Weight
from trimtab.methods.base import METHODS
from trimtab.methods.prune.allocations import Matrices
from trimtab.methods.prune.base import Pruner, found_masks
from trimtab.methods.prune.calibration import Batch, Calibration, gradients
from trimtab.methods.prune.evidence import warn_without
from trimtab.methods.prune.masks import Masks
from trimtab.methods.prune.scores import borrowed
from trimtab.methods.prune.selection import kth_smallest
from trimtab.methods.prune.settings import PruneSettings
from trimtab.settings import within

Values = dict[Weight, Tensor]


@dataclass(frozen=True)
class TAMTSettings(PruneSettings):
    """Settings of TAMT; one step of the optimiser a calibration batch."""

    learning_rate: float = 5e-5
    """Of AdamW at the first step; it falls to 0."""
    alpha: float = 2.0
    """Mask values at the start, in magnitude thresholds."""
    faithful: bool = False
    """Mask values at the threshold too, as the authors' code does: its first step masks out every weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None:
            raise ValueError(f"pattern: TAMT learns which weights go, found {self.pattern!r}; leave it out")
        if self.allocation not in (None, "global"):
            raise ValueError(f"allocation: TAMT learns it with one threshold, found {self.allocation!r}; leave it out")
        if self.floor:
            raise ValueError(f"floor: TAMT learns what each tensor keeps, found {self.floor}; leave it out")
        if self.until is not None:
            raise ValueError(
                "until: each batch is a step of TAMT's optimiser, whose learning rate falls over all of them, so that "
                "they cannot be halved; leave it out and set `batches`"
            )
        within(vars(self), learning_rate="(0, inf)", alpha="(0, inf)")


@METHODS.register("tamt")
class TAMT(Pruner):
    """Masks learned on the loss, the weights frozen."""

    score = "magnitude"
    allocation = "global"
    shares = False  # each batch is a step of the optimiser
    Settings = TAMTSettings
    settings: TAMTSettings

    @property
    def rounds(self) -> int:
        return 1

    def find(self, calibration: Calibration, sparsities: Sequence[float]) -> Iterator[Masks]:
        for sparsity in sparsities:
            *_, (_, last) = self.trace(calibration, sparsity)
            values = {w: v.abs() for w, v in last.items()}
            weights = self.prunable(calibration)
            yield found_masks(self.cut(values, weights, sparsity), weights.sizes)

    def counts(self, scores: Matrices, weights: Matrices, sparsity: float) -> dict[Weight, int]:
        """As every pruner; as the authors count if `faithful`: all that equals the threshold goes."""
        found = super().counts(scores, weights, sparsity)
        count = sum(found.values())
        if not self.settings.faithful or not count:
            return found
        threshold = kth_smallest(list(scores.values()), count)
        return {w: int((s <= threshold).sum()) for w, s in scores.items()}

    def trace(self, calibration: Calibration, sparsity: float) -> Iterator[tuple[Values, Values]]:
        """Mask values (out, in) at the start and now, after each step of the optimiser."""
        weights = self.prunable(calibration)
        own = {w: t.clone() for w, t in weights.items()}
        count = int(sparsity * sum(t.numel() for t in own.values()))
        if count == 0:
            yield own, own
            return
        values = self.begin(own, sparsity, count)
        first = {w: v.clone() for w, v in values.items()}
        batches = list(next(calibration.rounds()))
        optimizer = torch.optim.AdamW(values.values(), lr=self.settings.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(len(batches), 1))
        with borrowed(calibration.plain, weights) as current:

            def masked() -> Iterator[Batch]:
                for batch in batches:
                    self.mask(current, own, values, count)
                    yield batch

            idle = set(own)
            for found in gradients(calibration, weights, masked(), train=True):
                idle -= {w for w in idle if found[w].any()}
                for weight, value in values.items():
                    value.grad = found[weight] * own[weight] * value.sign()
                optimizer.step()
                schedule.step()
                yield first, values
            warn_without([str(w) for w in own if w in idle], len(own), "gradient")

    def begin(self, weights: Values, sparsity: float, count: int) -> Values:
        """Mask values at the start: one number where magnitude keeps a weight of its tensor, elsewhere 0."""
        level = self.settings.alpha * kth_smallest([t.abs() for t in weights.values()], count)
        values = {}
        for weight, tensor in weights.items():
            local = int(sparsity * tensor.numel())
            stays = tensor.abs() >= kth_smallest([tensor.abs()], local) if local else torch.ones_like(tensor).bool()
            values[weight] = stays * level
        return values

    def mask(self, current: Values, own: Values, values: Values, count: int) -> None:
        """Write the weights that the values keep into the model."""
        threshold = kth_smallest([v.abs() for v in values.values()], count)
        for weight, tensor in current.items():
            size = values[weight].abs()
            tensor.copy_(own[weight] * (size > threshold if self.settings.faithful else size >= threshold))
