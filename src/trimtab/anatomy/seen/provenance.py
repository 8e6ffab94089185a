"""What the call of one module computes from what: every tensor in it is followed back to the arguments of the call.

    trace = record(model, "encoder.layers.0", args, kwargs)     the module runs once, alone
    trace.calls                                                  modules inside: what went in, what came out
    trace.outputs -> Node -> Node.args -> ... -> "argument"      operations, below all modules and their names

`rerun` runs it again and changes one value on the way: what moves then was computed from that value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.anatomy.calls import parameter_names
from trimtab.anatomy.parts import Tap
from trimtab.anatomy.structure import module_at, plain_modules
from trimtab.anatomy.taps import rewrite


@dataclass(eq=False, repr=False)
class Node:
    """One tensor at one moment: an operation in place makes a new node of the same tensor.

    Attributes:
        op: name of the operation that made it; `argument` or `constant` (a parameter, a buffer) if none did.
        shape: its shape then.
        value: the tensor itself; what it holds may have been changed since.
        index: which operation of the run made it, from 0; -1 if none did.
        out: which tensor of what the operation returned.
        args: what the operation was called with by position, nodes in place of tensors.
        kwargs: and by keyword.
        pointwise: whether the operation treats every element by itself.
        sources: names of the arguments that it depends on.
        where: path of the module in which the operation ran.
        drawn: whether the operation draws random numbers.
    """

    op: str
    shape: torch.Size
    value: Tensor
    index: int = -1
    out: int = 0
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    pointwise: bool = False
    sources: frozenset[str] = frozenset()
    where: str = ""
    drawn: bool = False

    @property
    def parents(self) -> list[Node]:
        return list(_of_kind((self.args, self.kwargs), Node))


@dataclass(eq=False)
class Call:
    """One call of a module: its path, the tensors that went in and came out, and which operations ran in it.

    Attributes:
        path: plain path of the module.
        enter: number of operations that had run before it.
        exit: number of operations that had run after it.
        inputs: position or keyword -> node; tensors inside tuples are left out.
        outputs: position or field -> node; 0 for an output that is one tensor.
    """

    path: str
    enter: int
    exit: int = -1
    inputs: dict[int | str, Node] = field(default_factory=dict)
    outputs: dict[int | str, Node] = field(default_factory=dict)


@dataclass(eq=False)
class Trace:
    """What one call of a module did.

    Attributes:
        given: name of an argument -> its node; `name.0` for the first tensor in a tuple.
        calls: of the module itself and of those in it, in the order in which they began.
        output: what the module returned.
        outputs: position or field -> node, of what it returned.
    """

    given: dict[str, Node]
    calls: list[Call]
    output: Any
    outputs: dict[int | str, Node]

    def once(self, call: Call) -> bool:
        """Whether the module of a call was called once: only then a tap there is one value."""
        return sum(other.path == call.path for other in self.calls) == 1


# --- recording --------------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Keeps every tensor alive, so that `id` names it for the whole run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.stack: list[str] = []
        self._nodes: dict[int, Node] = {}
        self._shared: dict[int, list[Tensor]] = {}  # storage -> the tensors that look at it

    def node(self, tensor: Tensor) -> Node:
        if (known := self._nodes.get(id(tensor))) is None:
            known = self.put(tensor, Node("constant", tensor.shape, tensor))
        return known

    def put(self, tensor: Tensor, node: Node) -> Node:
        if id(tensor) not in self._nodes:
            self._shared.setdefault(_storage(tensor), []).append(tensor)
        self._nodes[id(tensor)] = node
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        before = (_mapped(args, self.node), _mapped(kwargs, self.node))
        out = func(*args, **kwargs)
        index, self.count = self.count, self.count + _counts(func)
        changed = _written(func, args, kwargs)
        name = func._schema.name.rpartition("::")[2]
        name = name.removesuffix("_") if changed else name
        sources = frozenset().union(*(n.sources for n in _of_kind(before, Node)))
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        made = list(_of_kind(out, Tensor))
        for i, tensor in enumerate([*made, *(t for t in changed if not any(t is m for m in made))]):
            new = Node(name, tensor.shape, tensor, index, i, *before, torch.Tag.pointwise in func.tags, sources,
                       self.stack[-1] if self.stack else "", drawn)  # fmt: skip
            self.put(tensor, new)
            if any(tensor is t for t in changed):
                self._changed(tensor, new)
        return out

    def _changed(self, tensor: Tensor, new: Node) -> None:
        """Other tensors that look at the same memory have changed with it."""
        for other in self._shared[_storage(tensor)]:
            if other is tensor:
                continue
            if _place(other) == _place(tensor):
                self._nodes[id(other)] = new
                continue
            old = self._nodes[id(other)]
            self._nodes[id(other)] = Node("changed", other.shape, other, new.index, 0, (old, new), {}, False,
                                          old.sources | new.sources, new.where)  # fmt: skip


def _counts(func: Any) -> bool:
    """Whether an operation is counted. Torch hands a value on by these or not, as it is kept elsewhere or not."""
    return func._schema.name not in ("aten::detach", "aten::alias", "aten::lift_fresh")


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a kind of tensor without a storage of its own
        return -id(tensor)


def _place(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors among the arguments of an operation that it writes to."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return list(_of_kind(found, Tensor))


def record(model: nn.Module, path: str, args: tuple, kwargs: dict) -> Trace:
    """Run the module at a plain path once and follow every tensor in it.

    Args:
        model: the model; only this module of it runs.
        path: of the module.
        args: with which it is called by position; the tensors are copied first.
        kwargs: and by keyword.
    """
    module = module_at(model, path)
    args, kwargs, _ = fresh(args, kwargs)
    recorder, calls, opened = _Recorder(), [], []
    given: dict[str, Node] = {}
    for name, tensor in named_tensors(module, args, kwargs):
        node = Node("argument", tensor.shape, tensor, sources=frozenset([name]))
        # The same tensor may be passed twice (queries, keys and values): the first name counts.
        given[name] = recorder.node(tensor) if id(tensor) in recorder._nodes else recorder.put(tensor, node)

    def begin(at: str) -> Callable:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            call = Call(at, recorder.count)
            call.inputs = {k: recorder.node(v) for k, v in [*enumerate(args), *kwargs.items()] if isinstance(v, Tensor)}
            calls.append(call)
            opened.append(call)
            recorder.stack.append(at)

        return hook

    def end(_: nn.Module, args: tuple, out: Any) -> None:
        call = opened.pop()
        recorder.stack.pop()
        call.exit = recorder.count
        call.outputs = {k: recorder.node(v) for k, v in elements(out) if isinstance(v, Tensor)}

    with ExitStack() as stack:
        for at, _ in plain_modules(module, path):
            inner = module_at(model, at)
            stack.callback(inner.register_forward_pre_hook(begin(at), with_kwargs=True).remove)
            stack.callback(inner.register_forward_hook(end).remove)
        stack.enter_context(recorder)
        output = module(*args, **kwargs)
    return Trace(given, calls, output, calls[0].outputs)


# --- running again ----------------------------------------------------------------------------------------------------


class _Changing(TorchDispatchMode):
    """Counts the operations as `_Recorder` does; changes one value, keeps others."""

    def __init__(self, at: Node | None, by: Tensor | None, watch: list[Node]):
        super().__init__()
        self.at, self.by, self.watch = at, by, watch
        self.count = 0
        self.paused = False
        self.seen: dict[Node, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.paused or not _counts(func):
            return out
        index, self.count = self.count, self.count + 1
        if self.at is not None and self.at.index == index and (found := _same(self.at, out)) is not None:
            found.add_(self.by.reshape(found.shape))  # type: ignore[union-attr]
        for node in self.watch:
            if node.index == index and (found := _same(node, out)) is not None:
                self.seen[node] = found.clone()
        return out


class _Enough(BaseException):
    """Ends a run of which all that is wanted has been seen; no model catches it."""


class _Until(TorchDispatchMode):
    """Ends a run at one operation, counted as `_Recorder` does."""

    def __init__(self, at: Node):
        super().__init__()
        self.at, self.count = at, 0
        self.found: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not _counts(func):
            return out
        if self.count == self.at.index:
            made = list(_of_kind(out, Tensor))
            if func._schema.name.rpartition("::")[2].removesuffix("_") == self.at.op and self.at.out < len(made):
                self.found = made[self.at.out].clone()
            raise _Enough
        self.count += 1
        return out


def until(module: nn.Module, args: tuple, kwargs: dict, at: Node) -> Tensor | None:
    """Run a module as far as one of its values, and give that; None if another run has taken another way.

    Args:
        module: on other rows than those of which the value was recorded, perhaps.
        args: as in `record`.
        kwargs: as in `record`.
        at: the value, as recorded.
    """
    args, kwargs, _ = fresh(args, kwargs)
    mode = _Until(at)
    try:
        with torch.no_grad(), mode:
            module(*args, **kwargs)
    except _Enough:
        return mode.found
    except Exception:
        return None
    return None


def _same(node: Node, out: Any) -> Tensor | None:
    """The tensor of a node in another run; None if that run has taken another way."""
    made = list(_of_kind(out, Tensor))
    return made[node.out] if node.out < len(made) and made[node.out].shape == node.shape else None


def rerun(
    model: nn.Module, path: str, args: tuple, kwargs: dict, *, at: Node | None = None, by: Tensor | None = None,
    add: tuple[Tap, Tensor] | None = None, watch: Sequence[Node] = (), taps: Sequence[Tap] = (), stop: bool = False,
) -> tuple[dict[Node, Tensor], dict[Tap, Tensor], Any]:  # fmt: skip
    """Run a module as in `record`, with one value changed on the way.

    Args:
        model: the model.
        path: of the module.
        args: as in `record`.
        kwargs: as in `record`.
        at: a value that is changed: an argument, or what an operation gave.
        by: what is added to it, with as many elements.
        add: an output in the module, and what is added to it, as a method would do it.
        watch: values to be kept.
        taps: outputs to be kept.
        stop: whether the run ends as soon as these are kept; nothing is returned then.

    Returns:
        The values of `watch` that were computed in this run too, the tapped outputs, and what the module returned.
    """
    args, kwargs, _ = fresh(args, kwargs)
    module = module_at(model, path)
    if at is not None and at.index < 0:
        (name,) = at.sources
        dict(named_tensors(module, args, kwargs))[name].add_(by.reshape(at.shape))  # type: ignore[union-attr]
    mode, kept = _Changing(at, by, list(watch)), {}

    def hook(tap: Tap) -> Callable[[Tensor], Tensor]:
        def change(value: Tensor) -> Tensor:
            mode.paused = True  # what hooks compute is not counted
            kept[tap] = value.clone()
            new = value + add[1].to(value.dtype) if add is not None and add[0] == tap else value
            mode.paused = False
            if stop and len(kept) == len(taps):
                raise _Enough
            return new

        return change

    with ExitStack() as stack:
        for tap in [*taps, *([add[0]] if add is not None and add[0] not in taps else [])]:
            stack.callback(rewrite(model, tap, hook(tap)).remove)
        stack.enter_context(mode)
        try:
            output = module(*args, **kwargs)
        except _Enough:
            output = None
    return mode.seen, kept, output


# --- values -----------------------------------------------------------------------------------------------------------


def fresh(args: tuple, kwargs: dict) -> tuple[tuple, dict, dict[int, Tensor]]:
    """The arguments with copies of their tensors; one that is passed twice is copied once."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    return _mapped(args, copy), _mapped(kwargs, copy), copies


def named_tensors(module: nn.Module, args: tuple, kwargs: dict) -> Iterator[tuple[str, Tensor]]:
    """(name of the argument, tensor); `name.0` for the first in a tuple, the position for one without a name."""
    names = parameter_names(module)
    given = {names[i] if i < len(names) else str(i): value for i, value in enumerate(args)} | kwargs
    for name, value in given.items():
        yield from _inside(name, value)


def _inside(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _inside(f"{name}.{i}", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _inside(f"{name}.{key}", item)


def elements(out: Any) -> list[tuple[int | str, Any]]:
    """(key, value) of what a module returns, as a tap names it: a tensor is element 0 of itself."""
    if isinstance(out, (tuple, list)):
        return list(enumerate(out))
    return list(out.items()) if hasattr(out, "items") else [(0, out)]


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        items = [_mapped(v, change) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return {k: _mapped(v, change) for k, v in value.items()} if type(value) is dict else value


def _of_kind(value: Any, kind: type) -> Iterator[Any]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _of_kind(item, kind)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _of_kind(item, kind)
