"""Running models by the sizes of their tensors alone: no memory, no arithmetic, and yet the shapes of a real run.

    with sizes_only():
        model, batch = build(), example()       weights: sizes. Token ids, masks, labels, pictures: sizes and values
        loss = model(**batch)                   `hidden[labels >= 0]` has as many rows as there are labels

Some shapes depend on values: the rows that a mask chooses, how many patches a picture has. All of these come from a
batch, never from weights, and a batch is small. So what is computed from nothing but a batch is computed twice, as a
fake tensor and for real, and where an operation's shape needs a value, it is there. What depends on a weight has no
value: an operation that needs it fails, as on any fake tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from trimtab.counting import ASKS_DEVICE, Alive, device_of

Step = TypeVar("Step")

LARGEST = {"bytes": 2**29, "floats": 2**22}
"""What a tensor may take whose values are computed too: pictures are looked at (which are zero?), not changed. A mask
of floats lives in each layer's graph."""
MADE = {"bytes": 2**22, "floats": 2**16}
"""The same for tensors that come from nothing: masks and small random draws, not weights of a layer that is built."""

_aten = torch.ops.aten
_EMPTY = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
          _aten.new_empty_strided.default}  # fmt: skip

_DEPENDENT = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


@contextmanager
def sizes_only() -> Iterator[None]:
    """Tensors have shapes and types, but no memory and no values: models of any size are built and run at once.

    What is computed from a batch alone has values besides, so that shapes which depend on them are right.
    """
    from transformers import PreTrainedModel
    from transformers.initialization import no_init_weights

    # Modules stay where they are made; PEFT moves its own all the same, which fake tensors refuse.
    stay = mock.patch.object(nn.Module, "to", lambda self, *_, **__: self)
    # `no_init_weights` leaves out, with the values, that some weights are one and the same, which would count twice.
    tied = mock.patch.object(PreTrainedModel, "init_weights", lambda self: self.tie_weights(recompute_mapping=False))
    made = [mock.patch.object(torch, name, _of_numbers(getattr(torch, name))) for name in ("tensor", "as_tensor")]
    log = logging.getLogger("torch._subclasses.fake_tensor")  # an operation that fails is raised and need not be told
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, _Values(fake) as values, made[0], made[1], \
                no_init_weights(), tied, stay:  # fmt: skip
            try:
                yield
            finally:
                values.drop()
    finally:
        log.setLevel(level)


class _Values(TorchDispatchMode):
    """Above a `FakeTensorMode`: keeps the values of what is computed from values alone."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake
        # Fake tensor -> the real one. Not an attribute of it, which `deepcopy` would copy as well.
        self.real: Any = WeakTensorKeyDictionary()
        self.lost: list[Tensor] = []  # something unknown was written into them; held, so that their memory stays theirs

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is ASKS_DEVICE:
            return device_of(*args)
        kwargs = kwargs or {}
        if function is _aten.masked_select.default and self.value(args[1]) is not None:
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
            function, args = _aten.index.Tensor, (args[0].expand(shape), self._numbers(args[1], shape))
        if function is _aten.index.Tensor:
            args = (args[0], [number for index in args[1] for number in self._numbers(index)])
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if function in _EMPTY or any(self.value(t) is None for t in tensors):
            self._forget(function, args, kwargs)
            return function(*args, **kwargs)
        # An index of numbers has a shape that is known: masks are numbers by now.
        if function is not _aten.index.Tensor and _DEPENDENT & set(function.tags):
            found = self._really(function, args, kwargs)
            return tree_map(lambda x: self._sized(x) if isinstance(x, Tensor) else x, found)
        out = function(*args, **kwargs)
        if any(_large(t, bool(tensors), function) for t in tree_leaves(out) if isinstance(t, Tensor)):
            self._forget(function, args, kwargs)
            return out
        found = self._really(function, args, kwargs)
        for sized, values in zip(tree_leaves(out), tree_leaves(found), strict=True):
            if isinstance(sized, FakeTensor):
                self.real[sized] = values
        return out

    def value(self, tensor: Tensor) -> Tensor | None:
        """The real tensor with the values of a tensor, if they are known."""
        if not isinstance(tensor, FakeTensor):
            return tensor if type(tensor) is Tensor and tensor.device.type != "meta" else None
        real = self.real.get(tensor)
        memory = None if real is None or not self.lost else real.untyped_storage()._cdata
        return None if any(memory == gone.untyped_storage()._cdata for gone in self.lost) else real

    def _really(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives for real."""
        args, kwargs = tree_map(lambda x: self.value(x) if isinstance(x, Tensor) else x, (args, kwargs))
        with unset_fake_temporarily(), torch.no_grad():
            if function is _aten.sum.dim_IntList and args[0].dtype is torch.bool and args[0].nbytes > MADE["bytes"]:
                return _counted(*args, **kwargs)
            return function(*args, **kwargs)

    def drop(self) -> None:
        """Let all values go: models have cycles, in which tensors outlive the last use of them."""
        self.real, self.lost = WeakTensorKeyDictionary(), []

    def _sized(self, values: Tensor) -> Tensor:
        """A fake tensor with these values."""
        sized = self.fake.from_tensor(values)
        self.real[sized] = values
        return sized

    def _forget(self, function: Any, args: Any, kwargs: Any) -> None:
        """Something unknown is written into a tensor: its values, and those of all that share its memory, are gone."""
        if not function._schema.is_mutable:
            return
        for i, argument in enumerate(function._schema.arguments):
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(given) if argument.is_write else ():
                if isinstance(tensor, FakeTensor) and (real := self.real.get(tensor)) is not None:
                    self.lost.append(real)

    # --- rows that a mask chooses: the mask is known, what it chooses from is not -------------------------------------

    def _numbers(self, index: Tensor | None, shape: torch.Size | None = None) -> list[Tensor | None]:
        """Of a mask, spread to a shape, the numbers that it chooses, a tensor an axis; any other index as it is."""
        if index is None or index.dtype not in (torch.bool, torch.uint8) or (mask := self.value(index)) is None:
            return [index]
        with unset_fake_temporarily():
            chosen = mask.expand(mask.shape if shape is None else shape).nonzero().unbind(dim=1)
        return [self._sized(numbers) for numbers in chosen]


def _counted(mask: Tensor, dims: list[int] | None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """How many are true over some axes, by numpy: torch first copies a mask into 8 bytes a number."""
    found = mask.numpy().sum(axis=tuple(dims) if dims else None, dtype="int64", keepdims=keepdim)
    return torch.as_tensor(found, dtype=dtype or torch.int64)


def _large(out: Tensor, given: bool, function: Any) -> bool:
    """Whether the values of an output would take too much memory; those of a view take none."""
    if given and function.is_view:
        return False
    most = LARGEST if given else MADE
    return out.numel() > most["floats"] if out.is_floating_point() else out.nbytes > most["bytes"]


def _of_numbers(function: Any) -> Any:
    """`torch.tensor` of a list of tensors reads their memory, which fake ones do not have: it is given their values."""

    def make(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(data, (list, tuple)):
            data = tree_map(lambda x: x.tolist() if isinstance(x, FakeTensor) else x, data)
        return function(data, *args, **kwargs)

    return make


def counting() -> bool:
    """Whether `sizes_only` is in force."""
    return any(isinstance(mode, _Values) for mode in _get_current_dispatch_mode_stack())


def unlike(steps: Iterable[Step], alike: Callable[[Step], Any]) -> Iterator[Step]:
    """All steps of a loop; while nothing but memory is counted, of steps that are alike in a row only two.

    For loops that write into what is there before them. A third step then needs what the second did, with the first's
    remains around it.

    Args:
        steps: of the loop, each of which sets all of its variables anew.
        alike: what decides, beside the loop's surroundings, which tensors a step makes.
    """
    modes = _get_current_dispatch_mode_stack()
    memory_alone = any(isinstance(mode, Alive) for mode in modes) and counting()
    memory_alone = memory_alone and all(isinstance(mode, (Alive, _Values, FakeTensorMode)) for mode in modes)
    last: list[Any] = []
    for step in steps:
        key = alike(step) if memory_alone else None
        if not memory_alone or last != [key, key]:
            last = [*last[-1:], key]
            yield step


@contextmanager
def as_usual() -> Iterator[None]:
    """Within `sizes_only`, tensors as everywhere: for what computes with numpy, such as a processor of pictures."""
    with _disable_current_modes():
        yield
