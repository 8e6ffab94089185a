"""Evidence: what calibration finds out about each prunable matrix, summed while the batches go by.

    squares    mean squared input of each channel    (in,)         forward hooks, O(width) memory a matrix
    gram       mean of x x^T over the inputs x       (in, in)      forward hooks
    gradient   mean gradient of the loss             (out, in)     backward passes

Only what a score needs is collected. Inputs are summed within a call in single precision, and calls in double: that
adds numbers of 24 bits in 53, which is exact as long as no call's sum is below 2^-29 of the total, so that neither the
order nor the number of processes that share the batches changes a bit. Gradients are added in the order of the batches,
whichever process computed them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab import processes
from trimtab.anatomy import Weight
from trimtab.methods.prune.calibration import Batch, Calibration, evaluating, gradients
from trimtab.methods.prune.made import Made
from trimtab.methods.prune.settle import Settling
from trimtab.methods.prune.sums import InputSums
from trimtab.methods.prune.totals import Means, rows_and_columns

Need = Literal["squares", "gram", "gradient"]


@dataclass
class Evidence:
    """What calibration found out about a matrix (out, in), or about some of its rows; fields not needed are None.

    Attributes:
        rows: how many rows it is about.
        squares: (sum over batches and tokens of x_j^2) / (number of samples), (in,). As MULTIFLOW's code counts it: the
            divisor is the number of images or captions, not of tokens.
        gram: sum of x x^T over the same tokens / number of samples, (in, in); its diagonal is `squares`.
        gradient: gradient of the loss, averaged over batches, (rows, in).
    """

    rows: int
    squares: Any = None  # Any: a score that asks for a field finds a tensor there
    gram: Any = None
    gradient: Any = None


Found = dict[Weight, list[Evidence]]  # about the parts of each weight
Needs = AbstractSet[Need]


def collect(calibration: Calibration, weights: Iterable[Weight], needs: Needs, batches: Iterable[Batch],
            settling: Settling[tuple[Found, Found]] | None = None) -> Found:  # fmt: skip
    """Go over batches and collect what is needed about each weight.

    Of several processes each goes over its share of the batches, and all return the same.

    Args:
        calibration: the model.
        weights: about which something is wanted.
        needs: what.
        batches: of one round.
        settling: ends the round before the batches do; from the evidence of its two halves it tells how far they are.

    Returns:
        For each weight the evidence of its parts, from the first row down: one part, but for fused projections of an
        attention whose query and key have different inputs, and for a convolution in groups.

    Raises:
        ValueError: if there is no batch, a weight's module is never reached, a batch lacks the tokens' mask of a tower,
            inputs, loss or gradients are not finite (the module and the batch are named), or processes were given
            different batches.
    """
    weights = list(weights)
    model = calibration.plain
    shapes = {w: rows_and_columns(model, w) for w in weights}
    inputs = needs & {"squares", "gram"}
    mean = Mean(settling is not None)
    halved = settling is not None
    with InputSums(model, calibration.anatomy, weights, "gram" in needs, halved) if inputs else nullcontext() as sums:
        shared: Iterable[Batch | None] = processes.share(batches)
        if settling:
            shared = settling.over(shared, lambda: _halves(shapes, needs, sums, mean))
        watched = sums.checked(shared) if sums else shared
        if "gradient" in needs:
            mean.take(model, weights, gradients(calibration, weights, watched))
        else:
            with evaluating(calibration.with_task), torch.no_grad():
                for batch in watched:
                    if batch is not None:
                        calibration.output(batch)
        found = sums.result() if sums else {}
    evidence = _evidence(shapes, needs, found, mean.result())
    for need in needs:
        named = [str(w) for w in weights if not any(getattr(e, need).any() for e in evidence[w])]
        warn_without(named, len(weights), "gradient" if need == "gradient" else "input")
    return evidence


def _evidence(
    shapes: dict[Weight, tuple[int, int]], needs: Needs, found: Means, mean: Mapping[Weight, Tensor]
) -> Found:
    """What is known about each weight, from means of its inputs and its mean gradient."""
    evidence = {w: [Evidence(rows)] for w, (rows, _) in shapes.items()}
    for weight, parts in found.items():
        gram = "gram" in needs
        evidence[weight] = [Evidence(n, m.diagonal() if gram else m, m if gram else None) for n, m in parts]
    for weight, gradient in mean.items():
        for part, g in zip(evidence[weight], gradient.split([e.rows for e in evidence[weight]]), strict=True):
            part.gradient = g
    return evidence


def _halves(shapes: dict[Weight, tuple[int, int]], needs: Needs, sums: InputSums | None, mean: Mean
            ) -> tuple[Found, Found]:  # fmt: skip
    """What each half of the batches says so far."""
    found: Sequence[Means] = sums.halves() if sums else ({}, {})
    one, other = (_evidence(shapes, needs, f, m) for f, m in zip(found, mean.halves(), strict=True))
    return one, other


def warn_without(names: list[str], total: int, what: str) -> None:
    """Warn of matrices about which calibration found out nothing."""
    if names:
        warnings.warn(
            f"{len(names)} of {total} matrices had no {what} on the calibration data, first '{names[0]}': nothing but "
            "the magnitudes of their weights tells which matter. Give batches that use them, or leave them out of the "
            "anatomy's towers",
            stacklevel=2,
        )


class Mean:
    """The mean of batches' gradients, added in the order of the batches.

    Args:
        halved: sum the batches 1, 3, 5 ... by themselves, too.
    """

    def __init__(self, halved: bool = False):
        self.total: dict[Weight, Tensor] = {}
        self.first: dict[Weight, Tensor] | None = {} if halved else None
        self.count = 0

    def take(self, model: nn.Module, weights: list[Weight], found: Iterable[dict[Weight, Tensor] | None]) -> None:
        """Add gradients; None: this process has no batch of a group."""
        for own in found:
            members = sum(processes.everywhere(own is not None))  # the first so many processes have a batch
            for weight in weights:
                gradient = _nothing(model, weight) if own is None else own[weight]
                for i, one in enumerate(processes.in_order(gradient)[:members]):
                    if self.first is not None and (self.count + i) % 2 == 0:
                        self.first[weight] = self.first[weight].add_(one) if weight in self.first else one.clone()
                    self.total[weight] = self.total[weight].add_(one) if weight in self.total else one
            self.count += members

    def result(self) -> dict[Weight, Tensor]:
        """The mean, in place of the sum: to be asked for once, at the end."""
        return {w: t.div_(self.count) for w, t in self.total.items()}

    def halves(self) -> tuple[Made, Made]:
        """Means of the two halves so far, made when they are looked at."""
        first, odd = self.first or {}, (self.count + 1) // 2
        numbers = {w: t.numel() for w, t in self.total.items()}
        one = Made(numbers, lambda w: first[w] / odd)
        return one, Made(numbers, lambda w: (self.total[w] - first[w]) / max(self.count - odd, 1))


def _nothing(model: nn.Module, weight: Weight) -> Tensor:
    """A gradient of no batch, as `gradients` would give it."""
    parameter = weight.of(model)
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros(rows_and_columns(model, weight), dtype=dtype, device=parameter.device)
