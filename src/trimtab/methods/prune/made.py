"""Matrices that are made when they are looked at: scores of all tensors are never in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from trimtab.anatomy import Weight
from trimtab.methods.prune.rows import single


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

    def __iter__(self) -> Iterator[Weight]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


class Listed(Sequence[Tensor]):
    """Some matrices of a mapping in a row, looked up one at a time whenever they are asked for."""

    def __init__(self, matrices: Mapping[Weight, Tensor], members: Sequence[Weight]):
        known = sizes(matrices)
        self.matrices, self.members = matrices, list(members)
        self.sizes = [known[w] for w in self.members]

    def __getitem__(self, i):
        return self.matrices[self.members[i]]

    def __len__(self) -> int:
        return len(self.members)


def sizes(matrices: Mapping[Weight, Tensor]) -> dict[Weight, int]:
    """How many elements each matrix has; none is made for that."""
    return matrices.sizes if isinstance(matrices, Made) else {w: t.numel() for w, t in matrices.items()}


def absolute(matrices: Mapping[Weight, Tensor]) -> Made:
    """The magnitudes of matrices, in single precision or better."""
    return Made(sizes(matrices), lambda weight: single(as_stored(matrices, weight).abs()))


def as_stored(matrices: Mapping[Weight, Tensor], weight: Weight) -> Tensor:
    """A matrix in the precision in which it is stored: what only compares its numbers needs no copy in a higher one."""
    return matrices.stored(weight) if isinstance(matrices, Made) else matrices[weight]
