"""Products of inputs with parameters that no layer of torch multiplies by: experts of a mixture, bare parameters.

    expert i of P (experts, out, in):   F.linear(x, P[i])     x @ P[i].T     torch.bmm(x, P.mT)     einsum("bi,oi->bo")

Read where they are computed, above autocast. A product's operand is a piece of a parameter if it looks at the same
memory; its offset and strides say which expert it is and whether it is stored as (out, in) or (in, out). No name is
read. A parameter that is also used in any other way (added, looked up, exponentiated, copied) is no matrix here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from trimtab.anatomy.weights import stored_transposed

_PLAIN = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm}
_ADDED = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm}


class Piece(NamedTuple):
    """What of a parameter an operand is: its path, the expert (None: a plain matrix, -1: all), if it is transposed."""

    path: str
    expert: int | None
    transposed: bool


class Product(NamedTuple):
    """One product x W^T: of which parameter's expert, whether that is stored as (in, out), and the inputs (..., in)."""

    path: str
    expert: int | None
    transposed: bool
    input: Tensor


class Products(TorchFunctionMode):
    """A context that reports every product with one of some parameters, before it is computed.

    Args:
        parameters: (path, parameter) of two axes, or of three with the experts first.
        then: called with each `Product`.

    Attributes:
        other: path -> the function that used the parameter in another way than a product.
    """

    def __init__(self, parameters: Mapping[str, Tensor], then: Callable[[Product], None]):
        super().__init__()
        self.watched = {_storage(p): (path, p) for path, p in parameters.items()}
        self.then = then
        self.other: dict[str, str] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        touched = [t for t in _tensors((*args, *kwargs.values())) if _storage(t) in self.watched]
        if not touched:
            return function(*args, **kwargs)
        found = self._products(function, args, kwargs)
        for product in found:
            self.then(product)
        out = function(*args, **kwargs)
        if not found and any(_storage(t) not in self.watched for t in _tensors((out,))):
            for tensor in touched:
                self.other.setdefault(self.watched[_storage(tensor)][0], getattr(function, "__name__", str(function)))
        return out

    def _products(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Product]:
        """The products that a call computes; none if it uses a watched parameter in any other way."""
        if function is F.linear:
            x, w = (*args, *(kwargs[n] for n in ("input", "weight") if n in kwargs))[:2]
            return self._product(x, w, across=False)
        if function in _PLAIN or function in _ADDED:
            operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            operands = operands[1:] if function in _ADDED else operands
            if len(operands) != 2:
                return []
            left, right = operands
            if _storage(right) in self.watched:
                return self._product(left, right, across=True)
            return self._product(right.mT, left, across=False) if right.ndim > 1 else []
        if function is torch.einsum and len(args) == 3 and isinstance(args[0], str):
            return self._einsum(args[0].replace(" ", ""), *args[1:])
        return []

    def _product(self, x: Tensor, w: Tensor, across: bool) -> list[Product]:
        """Products of inputs (..., in) with an operand: (out, in), or (in, out) if `across`."""
        piece = self._piece(w)
        if piece is None or _storage(x) in self.watched:
            return []
        transposed = piece.transposed != across
        if piece.expert != -1:
            return [Product(piece.path, piece.expert, transposed, x)]
        if x.ndim < 3 or x.shape[-3] not in (1, len(w)):
            return [Product(piece.path, i, transposed, x) for i in range(len(w))] if x.ndim == 2 else []
        each = x.expand(*x.shape[:-3], len(w), *x.shape[-2:]).unbind(-3)
        return [Product(piece.path, i, transposed, one) for i, one in enumerate(each)]

    def _einsum(self, equation: str, left: Tensor, right: Tensor) -> list[Product]:
        """Products of an einsum of two operands with one summed axis and one output axis of the matrix."""
        if "." in equation or "->" not in equation:
            return []
        inputs, result = equation.split("->")
        names = inputs.split(",")
        if len(names) != 2:
            return []
        w, x = (left, right) if _storage(left) in self.watched else (right, left)
        of_w, of_x = names if w is left else reversed(names)
        summed = [a for a in of_w if a in of_x and a not in result]
        out = [a for a in of_w if a not in of_x and a in result]
        stack = [a for a in of_w if a in of_x and a in result]
        if len(summed) != 1 or len(out) != 1 or len(stack) != len(of_w) - 2 or len(set(of_x)) != len(of_x):
            return []
        free = [a for a in of_x if a not in summed and a not in stack]
        order = [*stack, *free, *summed]
        x = x.permute([of_x.index(a) for a in order])
        w = w.permute([of_w.index(a) for a in (*stack, *out, *summed)])
        if not stack:
            return self._product(x, w, across=False)
        piece = self._piece(w)
        if piece is None or piece.expert != -1:
            return []
        return [Product(piece.path, i, piece.transposed, one) for i, one in enumerate(x.unbind(0))]

    def _piece(self, w: Tensor) -> Piece | None:
        """What of a watched parameter an operand is; None if it is no whole matrix of it."""
        path, p = self.watched.get(_storage(w), ("", None))
        if p is None:
            return None
        while w.ndim > 2 and p.ndim == 2 and (w.shape[0] == 1 or w.stride(0) == 0):  # one matrix for every sample
            w = w[0]
        offset = w.storage_offset() - p.storage_offset()
        if w.ndim == p.ndim:
            for transposed in (False, True):
                view = p.mT if transposed else p
                if offset == 0 and w.shape == view.shape and w.stride() == view.stride():
                    return Piece(path, None if p.ndim == 2 else -1, transposed)
        elif w.ndim == 2 and p.ndim == 3 and offset % p.stride(0) == 0:
            for transposed in (False, True):
                view = p[0].T if transposed else p[0]
                if w.shape == view.shape and w.stride() == view.stride():
                    return Piece(path, offset // p.stride(0), transposed)
        return None


def _storage(tensor: Tensor) -> int:
    """Where a tensor's numbers lie; 0 for those that have no memory of their own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Let the experts of transformers' mixtures compute one after another, not in one fused product.

    Their own forward does so; the config of each names another implementation by default.
    """
    configs = {id(m.config): m.config for m in model.modules() if stored_transposed(m) is not None}
    before = {key: config._experts_implementation for key, config in configs.items()}  # type: ignore[union-attr]
    try:
        for config in configs.values():
            config._experts_implementation = "eager"  # type: ignore[union-attr]
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]  # type: ignore[union-attr]
