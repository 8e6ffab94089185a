"""Matrices that are made when they are looked at: scores of all tensors are never in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from trimtab.anatomy import Weight
from trimtab.methods.prune.rows import single

_PIECE = 1 << 18  # elements looked at together: with their keys in a selection they fit into a core's cache


def pieces(matrix: Tensor) -> Iterator[Tensor]:
    """The elements of a matrix, a few at a time."""
    yield from matrix.flatten().split(_PIECE)


class Made(Mapping[Weight, Tensor]):
    """A mapping from weights to matrices (out, in), each made anew by every look at it, and kept by nobody.

    Args:
        sizes: how many elements each has.
        make: from a weight to its matrix, the same at every call.
        stored: to the same numbers as they are stored, where `make` copies them to a higher precision.
    """

    def __init__(self, sizes: Mapping[Weight, int], make: Callable[[Weight], Tensor],
                 stored: Callable[[Weight], Tensor] | None = None):  # fmt: skip
        self.sizes, self.make, self.stored = dict(sizes), make, stored or make

    def __getitem__(self, weight: Weight) -> Tensor:
        self.sizes[weight]  # a KeyError for what is not there
        return self.make(weight)

    def pieces(self, weight: Weight) -> Iterator[Tensor]:
        """Its elements in some order, of shape (n,), a few at a time."""
        yield from pieces(self[weight])

    def __iter__(self) -> Iterator[Weight]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


class Magnitudes(Made):
    """The magnitudes of matrices, in single precision or better."""

    def __init__(self, matrices: Mapping[Weight, Tensor]):
        super().__init__(sizes(matrices), lambda weight: single(as_stored(matrices, weight).abs()))
        self.matrices = matrices

    def pieces(self, weight: Weight) -> Iterator[Tensor]:
        """So that a threshold over magnitudes copies no matrix to a higher precision."""
        for piece in pieces(as_stored(self.matrices, weight)):
            yield single(piece.abs())


class Listed(Sequence[Tensor]):
    """Some matrices of a mapping in a row, looked up one at a time whenever they are asked for."""

    def __init__(self, matrices: Mapping[Weight, Tensor], members: Sequence[Weight]):
        known = sizes(matrices)
        self.matrices, self.members = matrices, list(members)
        self.sizes = [known[w] for w in self.members]

    def __getitem__(self, i):
        return self.matrices[self.members[i]]

    def pieces(self, i: int) -> Iterator[Tensor]:
        """The elements of one of them, of shape (n,), a few at a time."""
        weight, matrices = self.members[i], self.matrices
        return matrices.pieces(weight) if isinstance(matrices, Made) else pieces(matrices[weight])

    def __len__(self) -> int:
        return len(self.members)


def sizes(matrices: Mapping[Weight, Tensor]) -> dict[Weight, int]:
    """How many elements each matrix has; none is made for that."""
    return matrices.sizes if isinstance(matrices, Made) else {w: t.numel() for w, t in matrices.items()}


def as_stored(matrices: Mapping[Weight, Tensor], weight: Weight) -> Tensor:
    """A matrix in the precision in which it is stored: what only compares its numbers needs no copy in a higher one."""
    return matrices.stored(weight) if isinstance(matrices, Made) else matrices[weight]
