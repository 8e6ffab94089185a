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
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab import processes
from trimtab.anatomy import Weight
from trimtab.methods.prune.calibration import Batch, Calibration, evaluating, gradients
from trimtab.methods.prune.sums import InputSums, rows_and_columns

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


def collect(calibration: Calibration, weights: Iterable[Weight], needs: frozenset[Need] | set[Need],
            batches: Iterable[Batch]) -> dict[Weight, list[Evidence]]:  # fmt: skip
    """Go over batches and collect what is needed about each weight.

    Of several processes each goes over its share of the batches, and all return the same.

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
    batches = processes.share(batches)
    with InputSums(model, calibration.anatomy, weights, "gram" in needs) if inputs else nullcontext() as sums:
        watched = sums.checked(batches) if sums else batches
        mean: dict[Weight, Tensor] = {}
        if "gradient" in needs:
            mean = _mean(model, weights, gradients(calibration, weights, watched))
        else:
            with evaluating(calibration.with_task), torch.no_grad():
                for batch in watched:
                    if batch is not None:
                        calibration.output(batch)
        found = sums.result() if sums else {}
    evidence = {w: [Evidence(shapes[w][0])] for w in weights}
    for weight, parts in found.items():
        gram = "gram" in needs
        evidence[weight] = [Evidence(n, m.diagonal() if gram else m, m if gram else None) for n, m in parts]
    for weight, gradient in mean.items():
        for part, g in zip(evidence[weight], gradient.split([e.rows for e in evidence[weight]]), strict=True):
            part.gradient = g
    for need in needs:
        named = [str(w) for w in weights if not any(getattr(e, need).any() for e in evidence[w])]
        warn_without(named, len(weights), "gradient" if need == "gradient" else "input")
    return evidence


def warn_without(names: list[str], total: int, what: str) -> None:
    """Warn of matrices about which calibration found out nothing."""
    if names:
        warnings.warn(
            f"{len(names)} of {total} matrices had no {what} on the calibration data, first '{names[0]}': nothing but "
            "the magnitudes of their weights tells which matter. Give batches that use them, or leave them out of the "
            "anatomy's towers",
            stacklevel=2,
        )


def _mean(
    model: nn.Module, weights: list[Weight], found: Iterable[dict[Weight, Tensor] | None]
) -> dict[Weight, Tensor]:
    """The mean of batches' gradients, added in the order of the batches; None: this process has none of a group."""
    total: dict[Weight, Tensor] = {}
    count = 0
    for own in found:
        members = sum(processes.everywhere(own is not None))  # the first so many processes have a batch
        count += members
        for weight in weights:
            gradient = _nothing(model, weight) if own is None else own[weight]
            for one in processes.in_order(gradient)[:members]:
                total[weight] = total[weight].add_(one) if weight in total else one
    return {w: t.div_(count) for w, t in total.items()}


def _nothing(model: nn.Module, weight: Weight) -> Tensor:
    """A gradient of no batch, as `gradients` would give it."""
    parameter = weight.of(model)
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros(rows_and_columns(model, weight), dtype=dtype, device=parameter.device)
