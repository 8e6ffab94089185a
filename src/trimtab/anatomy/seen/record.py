"""One forward pass, watched: which modules ran, on what, and from what every tensor came.

Module hooks note the calls; a dispatch mode follows every tensor through every operation. A tensor is known by its
storage: a view has the number and the origins of what it is a view of, and writing into a view is writing into that.

    origins    a set, as the bits of a number: bit i is an input of the model, or a call of a module with weights
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from trimtab.anatomy.calls import arguments
from trimtab.anatomy.structure import AnatomyError, plain_module, plain_modules

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Trace:
    """A tensor as it was when a module was called, or had run.

    Attributes:
        number: of its storage; another tensor has another number, also where the memory is used again.
        origins: what it was computed from, as bits.
        shape: of the tensor.
        kind: its dtype.
        binary: whether it is none but 0 and 1, and may be a mask.
        value: itself, copied, if it was computed from a mask and may be one.
    """

    number: int
    origins: int
    shape: tuple[int, ...]
    kind: torch.dtype
    binary: bool = False
    value: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def floats(self) -> bool:
        return self.kind.is_floating_point


@dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        path: plain path of the module.
        module: itself.
        begin, end: when, in steps of module calls that begin or end.
        bit: of its result in origins; -1 if the module has no weights.
        given: argument -> its tensors, in their order; an argument that is passed without a name is `*i`.
        made: its tensors, in their order, and where each stands in the result: (0,) is the first element.
        kind: type of the result.
        size: how many elements it has; 1 if it is a tensor.
        told: which of them are numbers or text (sizes of a grid), and no tensor.
        held: (args, kwargs), copied, of a module that may be a block.
        result: the first tensor of the result, of such a module.
    """

    path: str
    module: nn.Module
    begin: int
    end: int = -1
    bit: int = -1
    given: dict[str, tuple[Trace, ...]] = field(default_factory=dict)
    made: list[tuple[tuple, Trace]] = field(default_factory=list)
    kind: type = object
    size: int = 1
    told: frozenset[int] = frozenset()
    held: tuple[tuple, dict] | None = None
    result: Any = None


class Recording:
    """What was seen of one forward pass.

    Attributes:
        calls: in the order in which they began.
        inputs: key of the example -> its bit in origins.
        rows: how many samples the example has; 0 if its tensors do not agree.
        output: the tensors that the model returned.
        read: number of a tensor -> the last step at which an operation read it.
        flows: origins of what the model returned to which a gradient goes back: without those that only say which
            numbers are taken, as indices and truth values.
    """

    def __init__(self, model: nn.Module, holds: set[str], masks: Collection[str] = ()):
        self.model, self.holds, self.masks = model, holds, masks
        self.calls: list[Call] = []
        self.inputs: dict[str, int] = {}
        self.rows = 0
        self.output: list[Trace] = []
        self.read: dict[int, int] = {}
        self.flows = 0
        self._open: list[Call] = []
        self._step = self._bits = self._numbers = 0
        self._known: dict[int, tuple[int, int]] = {}  # storage -> its number and origins
        self._smooth: dict[int, int] = {}  # storage -> those of its origins to which a gradient goes back
        self._copies: dict[tuple[int, int], Tensor] = {}

    def severed(self) -> tuple[str, ...]:
        """Modules with weights of their own that ran, and to which no gradient goes back from what was returned."""
        own = {c.path: c.module for c in self.calls if any(p is not None for p in c.module._parameters.values())}
        reached = {c.path for c in self.calls if c.bit >= 0 and self.flows >> c.bit & 1}
        return tuple(path for path in own if path not in reached)

    # --- tensors ---

    def seed(self, example: Example) -> None:
        """Give every input of the model a bit."""
        self.rows = rows_of(example)
        for key, value in example.items():
            bit = self.inputs[key] = self._next_bit()
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor):
                    self.made([tensor], 1 << bit, 1 << bit)

    def _next_bit(self) -> int:
        self._bits += 1
        return self._bits - 1

    def origins(self, tensor: Tensor) -> tuple[int, int]:
        """Number of a tensor's storage, and from what it was computed; a weight has no origin."""
        return self._known.setdefault(_storage(tensor), (self._fresh(), 0))

    def _fresh(self) -> int:
        self._numbers += 1
        return self._numbers

    def smooth(self, tensor: Tensor) -> int:
        """Those of a tensor's origins to which a gradient goes back."""
        return self._smooth.get(_storage(tensor), 0) if _bends(tensor) else 0

    def made(self, tensors: list[Tensor], origins: int, smooth: int, old: frozenset[int] = frozenset()) -> None:
        """Note what an operation made; in storages in `old` it wrote, or made a view of them."""
        for tensor in tensors:
            place = _storage(tensor)
            before = self._smooth.get(place, 0) if place in old else 0
            self._smooth[place] = before | smooth if _bends(tensor) else before
            if place in old:
                number, before = self.origins(tensor)
                self._known[place] = (number, before | origins)
            else:
                self._known[place] = (self._fresh(), origins)

    def trace(self, tensor: Tensor) -> Trace:
        number, origins = self.origins(tensor)
        binary, bits = is_binary(tensor), sum(1 << self.inputs[k] for k in self.masks)
        may_be = origins & bits and tensor.ndim > 1 and (binary or not origins & ~bits) and tensor.numel() < 1 << 20
        value = tensor.detach().clone() if may_be else None
        return Trace(number, origins, tuple(tensor.shape), tensor.dtype, binary, value)

    # --- calls ---

    def before(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        call = Call(path, module, self._tick())
        named = arguments(module, args, kwargs)
        passed = {f"*{i}": a for i, a in enumerate(args) if not any(a is v for v in named.values())}
        for name, value in (named | passed).items():
            if found := tuple(self.trace(t) for t in tree_leaves(value) if isinstance(t, Tensor)):
                call.given[name] = found
        if path in self.holds:
            call.held = tree_map(self._copy, (args, dict(kwargs)))
        self.calls.append(call)
        self._open.append(call)

    def after(self, path: str, module: nn.Module, weighs: bool, out: Any) -> None:
        while self._open and (call := self._open.pop()).path != path:  # a call that ended in an exception
            pass
        call.end, call.kind = self._tick(), type(out)
        if isinstance(out, (tuple, list)):
            call.size, call.told = len(out), frozenset(i for i, v in enumerate(out) if _tells(v))
        tensors = [(_keys(where), t) for where, t in tree_flatten_with_path(_plain(out))[0] if isinstance(t, Tensor)]
        if weighs:
            call.bit = self._next_bit()
            for _, tensor in tensors:
                number, origins = self.origins(tensor)
                self._known[_storage(tensor)] = (number, origins | 1 << call.bit)
                self._smooth[_storage(tensor)] = self._smooth.get(_storage(tensor), 0) | 1 << call.bit
        call.made = [(where, self.trace(t)) for where, t in tensors]
        if path in self.holds and tensors:
            call.result = self._copy(tensors[0][1])

    def _tick(self) -> int:
        self._step += 1
        return self._step

    def _copy(self, value: Any) -> Any:
        """Of a tensor, which the model may write into later; of a key-value cache, which would grow, nothing."""
        if hasattr(value, "get_seq_length"):
            return None
        if not isinstance(value, Tensor):
            return value
        if value.is_inference():  # it has no version
            return value.detach().clone()
        key = (id(value), value._version)
        if key not in self._copies:
            self._copies[key] = value.detach().clone()
            self._copies[(id(self._copies[key]), -1)] = value  # so that the id is not given to another meanwhile
        return self._copies[key]


_ATEN = torch.ops.aten
# Their values come from no tensor: made of numbers (`torch.tensor`) in memory of another, or only shaped like one.
_NEW = {
    _ATEN.lift_fresh, _ATEN.empty_like, _ATEN.zeros_like, _ATEN.ones_like, _ATEN.full_like, _ATEN.rand_like,
    _ATEN.randn_like, _ATEN.new_empty, _ATEN.new_empty_strided, _ATEN.new_zeros, _ATEN.new_ones, _ATEN.new_full,
}  # fmt: skip


class _Follow(TorchDispatchMode):
    """Follows every tensor through every operation."""

    def __init__(self, recording: Recording):
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in _NEW:
            out = func(*args, **kwargs)
            self.recording.made([out], 0, 0)
            return out
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        origins = smooth = 0
        for tensor in read:
            number, own = self.recording.origins(tensor)
            origins, smooth = origins | own, smooth | self.recording.smooth(tensor)
            self.recording.read[number] = self.recording._step
        places = frozenset(map(_storage, read))
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.recording.made(made, origins, smooth, places)
        written = [a for a, kind in zip(args, func._schema.arguments, strict=False) if _writes(kind)]
        self.recording.made([t for t in tree_leaves(written) if isinstance(t, Tensor)], origins, smooth, places)
        return out


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def record(model: nn.Module, example: Example, holds: set[str], masks: Collection[str] = ()) -> Recording:
    """Run a model once on an example and note what happens.

    Args:
        model: in evaluation mode.
        example: its keyword arguments.
        holds: paths of modules of which the arguments are kept: those that may be blocks.
        masks: keys of inputs that may be masks: what is computed from them alone is kept.

    Raises:
        AnatomyError: if the model does not run on the example; the message has its error.
    """
    found = Recording(model, holds, masks)
    with hooked(model, found.before, found.after), _Follow(found):
        found.seed(example)
        out = run(model, example)
        tensors = [t for t in tree_leaves(_plain(out)) if isinstance(t, Tensor)]
        found.output = [found.trace(t) for t in tensors]
        for t in tensors:
            found.flows |= found.smooth(t)
    found._known.clear()
    found._smooth.clear()
    return found


def run(model: nn.Module, example: Example) -> Any:
    """The model's output; AnatomyError, with its error and what it was given, if it does not run."""
    try:
        with torch.no_grad():
            return model(**example)
    except AnatomyError:
        raise
    except Exception as error:
        raise AnatomyError(
            f"{type(model).__name__} does not run on the example ({shapes(example)}): {type(error).__name__}: {error}. "
            "Give as `example` a batch with which the model is called: a dict of its keyword arguments"
        ) from error


@contextmanager
def hooked(model: nn.Module, before: Any, after: Any) -> Iterator[None]:
    """Call `before(path, module, args, kwargs)` and `after(path, module, whether it has weights, out)` at every call of
    a module of the plain model."""

    def hook_before(path: str) -> Any:
        return lambda module, args, kwargs: before(path, plain_module(module, ""), args, kwargs)

    def hook_after(path: str, weighs: bool) -> Any:
        return lambda module, args, out: after(path, plain_module(module, ""), weighs, out)

    handles = []
    try:
        for path, module in plain_modules(model):
            weighs = any(True for _ in module.parameters())
            handles.append(module.register_forward_pre_hook(hook_before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(hook_after(path, weighs)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def shapes(example: Example) -> str:
    """What an example holds, for messages."""
    return ", ".join(f"{k} {tuple(v.shape)}" for k, v in example.items() if isinstance(v, Tensor))


def rows_of(example: Example) -> int:
    """How many samples an example has: the length of most of its tensors."""
    lengths = [len(v) for v in tree_leaves(dict(example)) if isinstance(v, Tensor) and v.ndim]
    return max(set(lengths), key=lambda n: (lengths.count(n), -n)) if lengths else 0


def is_binary(value: Any) -> bool:
    """Whether something may be a mask: a tensor of two axes or more, none but 0 and 1; of numbers with a point, two."""
    if not isinstance(value, Tensor) or value.ndim < 2 or value.is_complex():
        return False
    if value.is_floating_point() and (value.ndim > 2 or not bool(value.any())):
        return False
    return value.dtype is torch.bool or bool(((value == 0) | (value == 1)).all())


def _tells(value: Any) -> bool:
    """Whether an element of a result is numbers or text alone, such as the size of a grid."""
    leaves = [v for v in tree_leaves(value) if v is not None]
    return bool(leaves) and all(isinstance(v, (bool, int, float, str)) for v in leaves)


def _bends(tensor: Tensor) -> bool:
    """Whether a gradient may go through a tensor."""
    return tensor.is_floating_point() or tensor.is_complex()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _plain(out: Any) -> Any:
    """A result as tuples and dictionaries: of a dataclass that is no mapping, its fields."""
    if hasattr(out, "keys") and hasattr(out, "values"):
        return dict(zip(out.keys(), out.values(), strict=True))
    if hasattr(out, "__dataclass_fields__") and not isinstance(out, type):
        return {k: getattr(out, k) for k in out.__dataclass_fields__}
    return out


def _keys(where: Any) -> tuple:
    return tuple(getattr(k, "idx", getattr(k, "key", k)) for k in where)
