"""What a tower's side network made, kept for the side networks of other towers (an encoder's, for its decoder's).

A reader's tower is called with what the read tower handed on, or with rows of it: once in training, at every step of a
generation, several times for several answers, and later still where a user keeps an encoder's outputs. So a result is
found by the very tensor that the tower handed on, row by row, and no row is taken for another. Where the reader's tower
gets that tensor changed (dropout, a projection), the two belong together only if one call of the model ran both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from trimtab.anatomy import AnatomyError


@dataclass
class Result:
    """A result and its mask, and how often the side network's parameters had been changed when it was made; compiled
    code does not ask."""

    tokens: Tensor
    mask: Tensor | None
    versions: tuple[int, ...]

    def rows(self, index: Tensor | None) -> Result:
        if index is None:
            return self
        mask = None if self.mask is None else self.mask.index_select(0, index)
        return Result(self.tokens.index_select(0, index), mask, self.versions)


@dataclass
class Results:
    """Results by what the tower handed on; they go when that does, for a graph may hang on them.

    Attributes:
        method: name, for error messages.
        tower: name of the tower.
        kept: results of what is still in use anywhere.
        last: the newest one of a pass without gradients and what the tower handed on: a model may go on with a copy.
        inside: whether a call of the model is under way.
        here: results that this call has made.
        around: whether modules stand around the tower; `also` is called after each.
        open: the newest one, while they still run.
    """

    method: str
    tower: str
    kept: Any = field(default_factory=WeakTensorKeyDictionary)
    last: tuple[Tensor, Result] | None = None
    inside: bool = False
    here: list[Result] = field(default_factory=list)
    around: bool = False
    open: Result | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what belongs to a pass."""
        return {"method": self.method, "tower": self.tower, "around": self.around}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def begin(self, *call: Any) -> None:
        """Before a call of the model."""
        self.inside, self.here = True, []

    def end(self, *call: Any) -> None:
        """After it, also if it failed."""
        self.inside, self.here = False, []

    def keep(self, value: Tensor, tokens: Tensor, mask: Tensor | None, side: nn.Module) -> None:
        """Keep a side network's result under what its tower hands on, `value`."""
        if self.inside and torch.compiler.is_compiling():  # nothing of it outlives the call
            self.here.append(Result(tokens, mask, ()))
            return
        result = Result(tokens, mask, _versions(side))
        self.kept[value] = _version(value), result
        self.last = None if tokens.requires_grad else (value, result)
        self.open = result if self.around else None
        if self.inside:
            self.here.append(result)

    def also(self, outermost: bool, module: nn.Module, args: tuple, out: Any) -> None:
        """After a module around the tower: what it hands on, behind a norm, say, belongs to the same result."""
        result, self.open = self.open, None if outermost else self.open
        if torch.compiler.is_compiling() or result is None:
            return
        values = [out] if isinstance(out, Tensor) else out.values() if isinstance(out, Mapping) else out
        for value in values if isinstance(values, Iterable) else ():
            if isinstance(value, Tensor) and value.shape[:2] == result.tokens.shape[:2]:
                self.kept[value] = _version(value), result
                self.last = None if self.last is None else (value, result)

    def take(self, reader: str, rows: int, given: Sequence[Tensor], side: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The result, row for row as a reader's tower has it, and its mask.

        Where the reader is handed several results (two pictures of a sample), their tokens follow each other.

        Args:
            reader: path of the block that reads, for error messages.
            rows: of the reader's batch.
            given: tensors with which the reader's first block was called.
            side: the side network that made the result.

        Raises:
            AnatomyError: if none belongs to what the reader was given, or the side network has changed since.
        """
        only = self.here[0] if len(self.here) == 1 else None
        found = self._found(given) if only is None or only.versions else []
        if not found and len(self.here) > 1:
            raise AnatomyError(
                f"{self.method}: block '{reader}' reads tower {self.tower!r}, which ran {len(self.here)} times in this "
                "call, and is handed none of its results as it was: which of them it reads is not known; leave one "
                "of the two towers out with `towers`"
            )
        result = joined(found) or only
        if result is None or len(result.tokens) != rows:
            raise AnatomyError(
                f"{self.method}: block '{reader}' works on {rows} rows and reads tower {self.tower!r}, whose side "
                f"network has seen {'another call or another order of rows' if self.last else 'nothing yet'}: run both "
                "towers in one call, on the inputs of the first and not on its outputs"
            )
        if result.versions and result.versions != _versions(side):
            raise AnatomyError(
                f"{self.method}: block '{reader}' reads tower {self.tower!r} as it was before its side network was "
                "trained further: run that tower again"
            )
        return result.tokens, result.mask

    def _found(self, given: Sequence[Tensor]) -> list[Result]:
        """Those that belong to the tensors, each once and in their order."""
        found = {id(result): result for result in map(self._result_of, given) if result is not None}
        return list(found.values())

    def _result_of(self, tensor: Tensor) -> Result | None:
        version, result = self.kept.get(tensor, (None, None))
        if version == _version(tensor):
            return result
        for value, result in self._values():
            known, index = _rows_of(tensor, value)
            if known:
                rows = result.rows(index)
                self.kept[tensor] = _version(tensor), rows  # the next step of a generation is called with the same
                return rows
        return None

    def _values(self) -> Iterator[tuple[Tensor, Result]]:
        if self.last is not None:
            yield self.last
        for value, (version, result) in list(self.kept.items()):
            if version == _version(value):
                yield value, result


def joined(results: Sequence[Result]) -> Result | None:
    """One result of the tokens of all, in their order; None of none."""
    if len(results) < 2:
        return results[0] if results else None
    masks = None
    if any(r.mask is not None for r in results):
        masks = torch.cat([r.tokens.new_ones(r.tokens.shape[:2]) if r.mask is None else r.mask for r in results], dim=1)
    return Result(torch.cat([r.tokens for r in results], dim=1), masks, results[0].versions)


def _version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; tensors of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def _versions(side: nn.Module) -> tuple[int, ...]:
    return tuple(map(_version, side.parameters()))


def _rows_of(tensor: Tensor, value: Tensor) -> tuple[bool, Tensor | None]:
    """Whether a tensor consists of rows of a value, and of which; None for all in their order."""
    if tensor.shape[1:] != value.shape[1:] or tensor.dtype != value.dtype or tensor.device != value.device:
        return False, None
    if isinstance(tensor, FakeTensor) or not tensor.ndim or not len(value):
        return tensor.shape == value.shape, None
    if tensor.shape == value.shape and torch.equal(tensor, value):
        return True, None
    index = torch.full((len(tensor),), -1, device=tensor.device)
    for row, one in enumerate(value):
        index[(tensor == one).flatten(1).all(dim=1)] = row
    return bool((index >= 0).all()), index
