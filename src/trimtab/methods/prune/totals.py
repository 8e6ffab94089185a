"""What is summed over the inputs of matrices, added up: over batches, over the halves of them, and over processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab import processes
from trimtab.anatomy import Weight

Means = dict[Weight, list[tuple[int, Tensor]]]  # of each part of a weight its rows, and the mean of what was summed


def rows_and_columns(model: nn.Module, weight: Weight) -> tuple[int, int]:
    """(out, in) of a prunable matrix, however its parameter is stored."""
    shape = weight.of(model).shape
    shape = shape if weight.expert is None else shape[1:]
    return (shape[1], shape[0]) if weight.transposed else (shape[0], shape[1:].numel())


@dataclass
class Sum:
    """Sum over the inputs of `rows` rows of a matrix, over how many samples it goes, and the inputs' precision."""

    rows: int
    total: Tensor
    samples: int = 0
    dtype: torch.dtype = torch.float32


Sums = dict[Weight, list[Sum]]  # of each part of a weight


class Totals:
    """The sums of some weights of a model.

    Args:
        model: the model.
        weights: its matrices.
        gram: whether matrices (in, in) are summed, not numbers (in,).
        halved: keep those of the batches 1, 3, 5 ... by themselves, too.
    """

    def __init__(self, model: nn.Module, weights: list[Weight], gram: bool, halved: bool):
        self.model, self.weights, self.halved = model, weights, halved
        self.sums: Sums = {}
        self.first: Sums = {}  # of the batches 1, 3, 5 ...
        sizes = {w: rows_and_columns(model, w) for w in weights}
        self.rows = {w: rows for w, (rows, _) in sizes.items()}
        # Room for sums of squares is taken before any pass: small tensors that stay, among a pass's large ones that
        # come and go, would keep an allocator from using the room of these again.
        self.room = {} if gram else {w: torch.zeros(columns, dtype=torch.float64)
                                     for w, (_, columns) in sizes.items() if w.of(model).is_cpu}  # fmt: skip

    def add(self, weight: Weight, totals: list[Tensor], samples: int, number: int) -> None:
        """Add the sums of a weight's parts, among which its rows are divided evenly, from batch `number` (from 1).

        Raises:
            ValueError: if the weight had another number of parts before.
        """
        self._add_to(self.sums, weight, totals, samples)
        if self.halved and number % 2:
            self._add_to(self.first, weight, totals, samples)

    def _add_to(self, held: Sums, weight: Weight, totals: list[Tensor], samples: int) -> None:
        if weight not in held:
            room = self.room.pop(weight, None)
            if room is None or len(totals) > 1 or not totals[0].is_cpu or totals[0].shape != room.shape:
                room = torch.zeros(())
            held[weight] = [Sum(self.rows[weight] // len(totals), room) for _ in totals]
        sums = held[weight]
        if len(sums) != len(totals):
            raise ValueError(f"'{weight.module}' attends to its own input in one call and to another in the next; "
                             f"leave it out of the towers' scopes: one weight cannot be scored for both")  # fmt: skip
        for part, total in zip(sums, totals, strict=True):
            part.samples += samples
            part.dtype = torch.promote_types(part.dtype, total.dtype)
            wide = torch.float32 if total.is_mps else torch.float64  # Apple's GPUs have no double precision
            if part.total.shape == total.shape and part.total.device == total.device:
                part.total += total.to(wide)
            else:
                part.total = part.total.to(total.device, wide) + total.to(wide)

    def whole(self) -> Sums:
        """The sums over all processes, in each the same."""
        return self._gathered(self.sums)

    def halves(self, whole: Sums) -> tuple[Sums, Sums]:
        """`whole` divided into the batches 1, 3, 5 ... and the others; 0 where a half has no sample."""
        first = self._gathered(self.first)
        second: Sums = {}
        for weight, parts in whole.items():
            own = first.setdefault(weight, [Sum(p.rows, torch.zeros_like(p.total), 0, p.dtype) for p in parts])
            second[weight] = [Sum(p.rows, p.total - o.total, p.samples - o.samples, p.dtype)
                              for p, o in zip(parts, own, strict=True)]  # fmt: skip
        return first, second

    def means(self, sums: Mapping[Weight, list[Sum]]) -> Means:
        """For each part of a weight its rows and its sum divided by the samples' number, in the inputs' precision."""
        return {w: [(p.rows, (p.total / max(p.samples, 1)).to(p.dtype)) for p in sums[w]] for w in self.weights}

    def _gathered(self, sums: Sums) -> Sums:
        """Sums over processes, in each the same; those given stay as they are. One process that had no batch, or whose
        batches missed a module, has nothing to add to it."""
        if processes.world()[1] == 1:
            return dict(sums)
        own = {str(w): [(p.rows, p.samples, p.dtype, p.total.shape) for p in parts] for w, parts in sums.items()}
        every = processes.everywhere(own)
        found: Sums = {}
        for weight in self.weights:
            described = [parts for one in every if (parts := one.get(str(weight)))]
            if not described:
                continue
            if any(len(parts) != len(described[0]) for parts in described):
                raise ValueError(
                    f"'{weight.module}' attends to its own input in one process and to another in the next; leave it "
                    "out of the towers' scopes: one weight cannot be scored for both"
                )
            device = weight.of(self.model).device
            parts = sums.get(weight, [])
            found[weight] = []
            for i, (rows, _, _, shape) in enumerate(described[0]):
                total = parts[i].total.clone() if parts else torch.zeros(shape, dtype=torch.float64, device=device)
                dtype = max((p[i][2] for p in described), key=lambda d: d.itemsize)
                samples = sum(p[i][1] for p in described)
                found[weight].append(Sum(rows, processes.summed(total), samples, dtype))
        return found
