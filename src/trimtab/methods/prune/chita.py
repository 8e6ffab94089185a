"""CHITA (Benbaki et al., ICML 2023): which weights stay, and their new values, on a quadratic model of the loss.

    A        (n, P)   gradients of n batches at the P prunable weights, one row a batch
    f(b)     = 1/2 |y - A b|^2 + l/2 |b - w|^2 + a . b     y = A w,  l = n * ridge,  a = column sums of A / batch size
    minimise f over b with at most k non-zeros

The first term is the empirical Fisher matrix around the weights w, the last the loss's slope. One round: a step of
iterative hard thresholding over all weights divides k among blocks (a tensor, or a piece of one), each block takes such
a step from there, and the values of what it keeps are solved for exactly. CHITA++ does so in steps of growing sparsity,
with gradients of the model pruned so far; as MULTIFLOW's code arranges it.

All n gradients are held at once: n * P numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.anatomy import entering
from trimtab.methods.base import METHODS
from trimtab.methods.prune.allocations import Matrices
from trimtab.methods.prune.base import Pruner, found_masks
from trimtab.methods.prune.calibration import Batch, Calibration, gradients
from trimtab.methods.prune.evidence import warn_without
from trimtab.methods.prune.masks import Masks
from trimtab.methods.prune.scores import borrowed
from trimtab.methods.prune.selection import largest
from trimtab.methods.prune.settings import PruneSettings, StepSettings
from trimtab.methods.prune.settle import Settling
from trimtab.settings import within

_HALVINGS, _DOUBLINGS, _EVEN = 100, 10, 1e-10


class Degenerate(ArithmeticError):
    """No step of the line search lowers the objective."""


@dataclass
class Quadratic:
    """f(b) on some of the weights: rows of gradients (n, p), weights (p,), slope (p,), ridge l / 2."""

    rows: Tensor
    weights: Tensor
    slope: Tensor
    ridge: float

    def __post_init__(self) -> None:
        self.target = self.rows @ self.weights

    def __call__(self, b: Tensor) -> Tensor:
        rest, moved = self.target - self.rows @ b, b - self.weights
        return rest @ rest / 2 + self.ridge * (moved @ moved) + self.slope @ b

    def block(self, piece: slice) -> Quadratic:
        """The same for some of these weights, the others left as they are."""
        return Quadratic(self.rows[:, piece], self.weights[piece], self.slope[piece], self.ridge)

    def gradient(self, b: Tensor) -> Tensor:
        return -self.rows.t() @ (self.target - self.rows @ b) + self.slope - 2 * self.ridge * (self.weights - b)

    def curvature(self, direction: Tensor) -> Tensor:
        """The second derivative of f along a direction."""
        along = self.rows @ direction
        return along @ along + 2 * self.ridge * (direction @ direction)

    def solve(self, kept: Tensor) -> Tensor:
        """The minimiser of f among vectors that are zero outside `kept` (p,), in double precision.

        With n rows and more weights than that, the n x n system is solved (Woodbury): no block costs its size cubed.
        """
        rows = self.rows[:, kept].double()
        right = (
            rows.t() @ self.target.double() + 2 * self.ridge * self.weights[kept].double() - self.slope[kept].double()
        )
        double = 2 * self.ridge
        if rows.shape[1] <= rows.shape[0]:
            eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
            values = torch.linalg.solve(double * eye + rows.t() @ rows, right)
        else:
            eye = torch.eye(rows.shape[0], dtype=rows.dtype, device=rows.device)
            values = (right - rows.t() @ torch.linalg.solve(double * eye + rows @ rows.t(), rows @ right)) / double
        out = torch.zeros_like(self.weights)
        out[kept] = values.to(out.dtype)
        return out


def threshold_step(f: Quadratic, b: Tensor, count: int) -> Tensor:
    """One step of hard thresholding from b with a line search: at most `count` non-zeros.

    Raises:
        Degenerate: if the first trial of the line search does not lower f.
    """
    kept = largest(b.abs(), count)
    start = b * kept
    if count == 0:
        return start
    gradient = f.gradient(b)
    direction = gradient * kept
    curvature = f.curvature(direction)
    if curvature == 0:
        return start  # stationary on what is kept (a dead layer, say): there is nowhere to go
    step = gradient @ direction / curvature  # f is smallest there
    if _leads(b - step * gradient, kept):
        return (b - step * gradient) * kept
    step = step / 2
    for _ in range(_HALVINGS):
        if _leads(b - step * gradient, kept):
            break
        step = step / 2
    best, lowest = None, f(start)
    for _ in range(_DOUBLINGS):
        moved = b - step * gradient
        moved = moved * largest(moved.abs(), count)
        value = f(moved)
        if value >= lowest:
            break
        best, lowest, step = moved, value, step * 2
    if best is None:
        raise Degenerate
    return best


def _leads(b: Tensor, kept: Tensor) -> bool:
    """Whether the largest entry is among those kept (or one falls short of it by rounding alone)."""
    rest = b[~kept]
    return rest.numel() == 0 or bool(b[kept].abs().max() >= rest.abs().max() - _EVEN)


def prune_round(f: Quadratic, blocks: Sequence[slice], count: int, faithful: bool) -> Tensor:
    """The weights (p,) after one round: at most `count` non-zeros, divided among blocks, refitted within each."""
    try:
        everywhere = threshold_step(f, f.weights, count)
    except Degenerate:
        everywhere = f.weights * largest(f.weights.abs(), count)
    out = torch.zeros_like(f.weights)
    for piece in blocks:
        b = everywhere[piece]
        keep = int(b.count_nonzero())
        if keep == 0:
            continue
        block = f.block(piece)
        try:
            b = threshold_step(block, b, keep)
        except Degenerate:
            if faithful:
                continue
        out[piece] = block.solve(largest(b.abs(), keep))
    return out


@dataclass(frozen=True)
class ChitaSettings(PruneSettings):
    """Settings of CHITA."""

    ridge: float = 1e-5
    """Pull towards the weights as they were, per calibration batch (the authors' default; their cases differ)."""
    block_size: int = 10_000
    """Weights that are refitted together at least; a tensor of n is cut into n // block_size equal pieces."""
    faithful: bool = False
    """Set a block to zero when the first trial of its line search fails, as the authors' code does by mistake."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None:
            raise ValueError(f"pattern: CHITA divides the weights itself, found {self.pattern!r}; leave it out")
        if self.floor:
            raise ValueError(f"floor: CHITA divides the weights itself, found {self.floor}; leave it out")
        check_chita(self.allocation, self.ridge, self.block_size)


@dataclass(frozen=True)
class ChitaPPSettings(ChitaSettings, StepSettings):
    """Settings of CHITA++: CHITA's, in steps."""


def check_chita(allocation: str | None, ridge: float, block_size: int) -> None:
    """Raise a ValueError for settings that CHITA cannot work with."""
    if allocation not in (None, "global"):
        raise ValueError(
            f"allocation: CHITA divides the weights among tensors itself, found {allocation!r}; leave it out"
        )
    within(locals(), ridge="(0, inf)", block_size="[1, inf)")


@METHODS.register("chita")
class Chita(Pruner):
    """Weights and their new values from a quadratic model of the loss, at once."""

    score = "sensitivity"
    allocation = "global"
    changes_weights = True
    shares = False  # the gradients of all batches are held side by side
    Settings: ClassVar[type] = ChitaSettings
    settings: ChitaSettings | ChitaPPSettings

    def levels(self, sparsity: float) -> list[float]:
        return [sparsity]

    def find(self, calibration: Calibration, sparsities: Sequence[float]) -> Iterator[Masks]:
        for sparsity in sparsities:
            weights = self.prunable(calibration)
            shapes = {w: t.shape for w, t in weights.items()}
            sizes = [t.numel() for t in weights.values()]
            blocks = list(_blocks(sizes, self.settings.block_size))
            with borrowed(calibration.plain, weights) as current:
                levels = self.levels(sparsity)
                alive = torch.ones(sum(sizes), dtype=torch.bool, device=next(iter(current.values())).device)
                for level, batches in zip(levels, calibration.rounds(len(levels)), strict=True):
                    count = int((1 - level) * sum(sizes))
                    settling = self.settling(partial(self.differ, blocks=blocks, count=count), level == levels[0])
                    quadratic = self.quadratic(calibration, current, batches, alive, settling)
                    if level == levels[0]:
                        found = quadratic.rows.any(dim=0).split(sizes)
                        idle = [str(w) for w, part in zip(weights, found, strict=True) if not part.any()]
                        warn_without(idle, len(weights), "gradient")
                    new = prune_round(quadratic, blocks, count, self.settings.faithful)
                    alive = new != 0
                    for (weight, tensor), part in zip(current.items(), new.split(sizes), strict=True):
                        tensor.copy_(part.view(shapes[weight]))
                changed = {w: t.clone() for w, t in current.items()}
            yield found_masks(((w, t != 0) for w, t in changed.items()), weights.sizes, changed)

    def differ(self, halves: Sequence[Quadratic], blocks: Sequence[slice], count: int) -> float:
        """How far the masks are that models of the loss on two halves of the batches give."""
        one, other = (prune_round(f, blocks, count, self.settings.faithful) != 0 for f in halves)
        return max(int((one & ~other).sum()), int((other & ~one).sum())) / max(int(one.sum()), 1)

    def quadratic(self, calibration: Calibration, weights: Matrices, batches: Iterator[Batch], alive: Tensor,
                  settling: Settling[Sequence[Quadratic]] | None = None) -> Quadratic:  # fmt: skip
        """The model of the loss around the current weights, from a round's batches; only `alive` ones (P,) can move."""
        samples: list[int] = []

        def noted() -> Iterator[Batch]:
            for batch in batches:
                first = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
                yield batch
                # A row may have several pictures, or as many patches as it likes; then the texts tell.
                samples.append(min(entered.values(), default=first))
                entered.clear()

        flat = torch.cat([t.flatten() for t in weights.values()]).float()
        rows: list[Tensor] = []

        def model(own: Sequence[Tensor]) -> Quadratic:
            stacked = torch.stack(list(own))
            return Quadratic(stacked, flat, stacked.sum(dim=0) / samples[0], len(own) * self.settings.ridge / 2)

        source: Iterable[Batch | None] = noted()
        if settling is not None:
            source = settling.over(source, lambda: [model(rows[::2]), model(rows[1::2])])
        with entering(calibration.plain, calibration.anatomy.towers) as entered:
            for g in gradients(calibration, weights, source):
                rows.append(torch.cat([g[w].flatten() for w in weights]).float() * alive)
        return model(rows)


@METHODS.register("chita++")
class ChitaPP(Chita):
    """CHITA in steps, each on gradients of the model pruned so far."""

    Settings = ChitaPPSettings
    settings: ChitaPPSettings

    @property
    def rounds(self) -> int:
        return self.settings.steps

    def levels(self, sparsity: float) -> list[float]:
        return self.settings.levels(sparsity)


def _blocks(sizes: Sequence[int], block_size: int) -> Iterator[slice]:
    """The tensors as slices of their concatenation, a large one in as many equal pieces as hold at least `block_size`.

    Rounding leaves the last piece of a tensor a little longer than its others, as in the published code.
    """
    start = 0
    for size in sizes:
        pieces = max(1, size // block_size)
        for i in range(pieces):
            yield slice(start + i * (size // pieces), start + (size if i == pieces - 1 else (i + 1) * (size // pieces)))
        start += size
