"""From which named tensors another was computed: followed from operation to operation while a program runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SHAPE_ONLY = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
               "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided")  # fmt: skip


class Followed(TorchDispatchMode):
    """Notes for every tensor which named ones it was computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, set[str]] = {}
        self.alive: list[Any] = []
        self.asked: set[str] = set()  # whose values a program has asked for, to choose its way

    def _place(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self.alive.append(storage)  # so that no other gets its place
        return storage._cdata

    def named(self, name: str, tensor: Tensor) -> Tensor:
        self.of.setdefault(self._place(tensor), set()).add(name)
        return tensor

    def names(self, tensor: Tensor) -> set[str]:
        return self.of.get(self._place(tensor), set())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _SHAPE_ONLY:
            return out
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        names = set().union(*map(self.names, tensors)) if tensors else set()
        if not names:
            return out
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not made or {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.asked |= names
        for tensor in made:
            self.of.setdefault(self._place(tensor), set()).update(names)
        return out
