"""Products that a block has computed before: run again on the same numbers, it takes what it made of them then.

A block is run many times with one value changed. What comes before the change is the same each time, and of a product
with weights only the rows that were changed are others. Only products are kept: they are what a block costs. All that
goes in is compared with what went in before, so that an operation never gets a result of other numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn, ops
from torch import equal as same_numbers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_ATEN = ops.aten
_ROWS = {_ATEN.mm: 0, _ATEN.addmm: 1}  # products of which each row stands for itself -> the argument with the rows
_PRODUCTS = {
    *_ROWS, _ATEN.bmm, _ATEN.baddbmm, _ATEN.convolution, _ATEN._scaled_dot_product_flash_attention_for_cpu,
}  # fmt: skip
LIMIT = 1 << 28  # bytes that the products of one memo may take; what is beyond is computed each time


class _Weight(NamedTuple):
    """Which numbers of a module an operation took, without a copy of them."""

    storage: int
    place: tuple
    version: int


class _Product(NamedTuple):
    func: Any
    given: list[Any]  # all that went in, weights as `_Weight`
    made: Any


class Memo(TorchDispatchMode):
    """A context around each run of one module; the first run's products are kept, in their order.

    Args:
        module: whose parameters and buffers are not copied.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers()) if _versioned(t)}
        self._kept: list[_Product] = []
        self._next, self._bytes, self._closed = 0, 0, False

    def __enter__(self) -> Memo:
        self._next, self._closed = 0, self._closed or bool(self._kept)
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in _PRODUCTS:
            return func(*args, **kwargs)
        place, self._next = self._next, self._next + 1
        if place < len(self._kept):
            return self._again(self._kept[place], func, args, kwargs)
        made = func(*args, **kwargs)
        if not self._closed:
            self._keep(func, args, kwargs, made)
        return made

    def _keep(self, func: Any, args: tuple, kwargs: dict, made: Any) -> None:
        given = [self._named(v) for v in tree_leaves((args, kwargs))]
        tensors = [t for t in (*given, *tree_leaves(made)) if isinstance(t, Tensor)]
        self._bytes += sum(t.numel() * t.element_size() for t in tensors)
        self._closed = self._bytes > LIMIT
        if not self._closed:
            self._kept.append(_Product(func, [_copy(v) for v in given], tree_map(_copy, made)))

    def _again(self, old: _Product, func: Any, args: tuple, kwargs: dict) -> Any:
        """What an operation makes, as far as it has made it before."""
        given = tree_leaves((args, kwargs))
        if func is not old.func or len(given) != len(old.given):
            return func(*args, **kwargs)
        other = [i for i, (a, b) in enumerate(zip(old.given, given, strict=True)) if not self._same(a, b)]
        if not other:
            return tree_map(_copy, old.made)
        at = _ROWS.get(func.overloadpacket)
        if at is None or other != [at] or (at == 1 and args[0].ndim != 1):
            return func(*args, **kwargs)
        rows, before = args[at], old.given[at]
        if rows.shape != before.shape or rows.dtype != before.dtype:
            return func(*args, **kwargs)
        changed = (rows != before).any(1).nonzero().flatten()
        if len(changed) == len(rows):
            return func(*args, **kwargs)
        made = old.made.clone()
        made[changed] = func(*(rows[changed] if i == at else a for i, a in enumerate(args)), **kwargs)
        return made

    def _named(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not _versioned(value):
            return value
        storage = value.untyped_storage()._cdata
        if storage not in self._own:
            return value
        return _Weight(storage, (value.shape, value.stride(), value.storage_offset(), value.dtype), value._version)

    def _same(self, old: Any, new: Any) -> bool:
        new = self._named(new)
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            alike = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
            return alike and same_numbers(old, new)
        return type(old) is type(new) and old == new


def _versioned(tensor: Tensor) -> bool:
    """Whether it shows when a tensor is written to."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() and not tensor.is_meta


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
