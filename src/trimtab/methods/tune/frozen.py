"""What of a training step never changes: found by watching the step, then recorded, then played back.

    watched     every call of a module in a step                        -> which results stay, whatever is trained
    recorded    the outermost of these calls, what side networks see    -> leaves: tensors whose rows are samples
    played      the same step: those calls hand on what was recorded    -> no frozen block runs

Nothing is told from names. A call stays if its results are the same to the bit after every trained parameter was
changed and with other random numbers. A leaf is stored if the loss depends on it, which is followed from operation to
operation, and if its rows belong to samples, which a batch of other rows shows. All other results of these calls are
filled with NaN when they are played back, so that a mistake cannot stay unseen. What a side network reads it says
itself (`Listener`). `watching` finds a `Plan`; `Recording` and `Playing` carry it out.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from trimtab.methods.tune.listener import Listener, Seen
from trimtab.methods.tune.results import Result, joined

Values = dict[str, Tensor]
Key = tuple[str, int]  # path of a module, or name of a listener, and the number of the call in a step, from 0


@dataclass(frozen=True)
class Leaf:
    """A tensor that a step shows.

    Attributes:
        name: under which it is stored.
        shape: as it was seen.
        dtype: as it was seen.
        axis: of the samples; None if no axis is, or its rows depend on other samples.
        times: rows a sample on that axis (the frames of a video).
        texts: axes as long as the text, or longer by a fixed number.
        needed: whether the loss depends on its values.
        drawn: whether they depend on what is drawn anew in every view.
        narrow: whether it may be handed on in the precision in which it is stored.
        fixed: its value, if that is the same whatever the batch.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None = None
    times: int = 1
    texts: tuple[int, ...] = ()
    needed: bool = True
    drawn: bool = True
    narrow: bool = False
    fixed: Tensor | None = field(default=None, compare=False, repr=False)

    def stored(self, value: Tensor) -> Tensor:
        """With the samples as first axis."""
        assert self.axis is not None
        value = value.unflatten(self.axis, (-1, self.times)) if self.times > 1 else value
        return value.movedim(self.axis, 0)

    def handed(self, value: Tensor) -> Tensor:
        """The inverse of `stored`."""
        assert self.axis is not None
        value = value.movedim(0, self.axis)
        value = value.flatten(self.axis, self.axis + 1) if self.times > 1 else value
        return value if self.narrow or value.dtype == self.dtype else value.to(self.dtype)

    @property
    def text_axes(self) -> tuple[int, ...]:
        """`texts`, as axes of what is stored."""
        assert self.axis is not None
        shift = int(self.times > 1)
        return tuple(a + shift + (a < self.axis) * (1 - shift) for a in self.texts)

    @property
    def packed(self) -> bool:
        """Whether its values are many: a map of tokens or cells, no vector."""
        return self.dtype.is_floating_point and len(self.shape) >= 3

    def blank(self, rows: int, length: int | None, was: int | None, device: torch.device, dense: bool) -> Tensor:
        """What stands in its place where nobody needs its values: NaN, of its shape in a batch of so many rows, and of
        texts of another length than they were seen with."""
        shape = list(self.shape)
        if self.axis is not None:
            shape[self.axis] = rows * self.times
        for axis in self.texts if length is not None and was is not None else ():
            shape[axis] += length - was  # type: ignore[operator]
        nothing = float("nan") if self.dtype.is_floating_point else 0
        one = torch.full((), nothing, dtype=self.dtype, device=device)
        return one.expand(shape).clone() if dense else one.expand(shape)


@dataclass(frozen=True)
class Call:
    """A call of a module that stays as it is.

    Attributes:
        key: path of the module, and the number of its call in a step.
        spec: structure of its result.
        leaves: the result's parts: tensors, or plain values that are always the same.
        inside: how often modules below are called in it.
    """

    key: Key
    spec: TreeSpec
    leaves: tuple[Any, ...]
    inside: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Heard:
    """What a side network is shown at one of its calls.

    Attributes:
        key: name of its listener, and the number of its call.
        maps: hidden maps.
        rest: mask, value and position, those that are there.
        memory: the calls of another side network whose results it reads, one behind the other.
    """

    key: Key
    maps: tuple[Leaf, ...]
    rest: dict[str, Leaf]
    memory: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is recorded of a step.

    Attributes:
        calls: of modules, by their keys.
        heard: by side networks.
        batch: of the step's inputs.
        length: of the texts on which it was watched; None if all batches have one length.
        cut: whether leaves may be cut to a batch's longest text; else they are as long as the longest of all.
        dense: whether places that nobody reads must be tensors of their own (a model writes into them).
    """

    calls: dict[Key, Call]
    heard: dict[Key, Heard]
    batch: tuple[Leaf, ...] = ()
    length: int | None = None
    cut: bool = False
    dense: bool = False

    def leaves(self) -> Iterator[Leaf]:
        yield from self.batch
        for call in self.calls.values():
            yield from (leaf for leaf in call.leaves if isinstance(leaf, Leaf))
        for heard in self.heard.values():
            yield from (*heard.maps, *heard.rest.values())

    def changed(self, change: Callable[[Leaf], Leaf]) -> Plan:
        """The same with every leaf changed."""

        def call(c: Call) -> Call:
            return replace(c, leaves=tuple(change(x) if isinstance(x, Leaf) else x for x in c.leaves))

        def ear(h: Heard) -> Heard:
            return replace(h, maps=tuple(map(change, h.maps)), rest={k: change(v) for k, v in h.rest.items()})

        return replace(self, calls={k: call(c) for k, c in self.calls.items()},
                       heard={k: ear(h) for k, h in self.heard.items()},
                       batch=tuple(map(change, self.batch)))  # fmt: skip

    def told(self) -> dict[str, Any]:
        """As plain JSON, without what differs from batch to batch."""
        return {x.name: [list(x.shape), str(x.dtype), x.axis, x.times, list(x.texts), x.drawn] for x in self.kept()}

    def kept(self) -> Iterator[Leaf]:
        """What is recorded of samples."""
        return (x for x in self.leaves() if x.needed and x.fixed is None)


def leaves_of(name: str, value: Any) -> tuple[list[Any], TreeSpec]:
    """The parts of a module's result, tensors as leaves with their values beside: (leaf, tensor) or a plain value."""
    flat, spec = tree_flatten(value)
    found: list[Any] = []
    for i, part in enumerate(flat):
        if isinstance(part, Tensor):
            found.append((Leaf(f"{name}.{i}", tuple(part.shape), part.dtype), part))
        else:
            found.append(part)
    return found, spec


def leaves_heard(name: str, seen: Seen) -> tuple[list[Any], dict[str, Any]]:
    """The same of what a side network sees."""
    maps = [(Leaf(f"{name}.map{i}", tuple(m.shape), m.dtype, narrow=True), m) for i, m in enumerate(seen.maps)]
    parts = {"mask": seen.mask, "value": seen.value, "position": seen.position}
    rest = {k: (Leaf(f"{name}.{k}", tuple(v.shape), v.dtype), v) for k, v in parts.items() if v is not None}
    return maps, rest


def key_name(key: Key) -> str:
    """How leaves of a call are named."""
    return f"{key[0]}:{key[1]}"


# --- standing between a model and its modules -------------------------------------------------------------------------


class _Ear(nn.Module):
    """Stands before a side network; `hear(seen, side)` gives the result."""

    def __init__(self, side: nn.Module, hear: Callable[[Seen, nn.Module], Any]):
        super().__init__()
        self.side, self.hear = side, hear

    def forward(self, seen: Seen) -> Any:
        return self.hear(seen, self.side)


@contextmanager
def between(
    modules: Mapping[str, nn.Module],
    called: Callable[[str, Callable, tuple, dict], Any],
    listeners: Mapping[str, Listener],
    heard: Callable[[str, Seen, nn.Module], Any],
) -> Iterator[None]:
    """While this is open, `called(path, forward, args, kwargs)` gives the results of modules, and `heard(name, seen,
    side)` those of side networks. Hooks go on as before."""
    before: dict[str, Any] = {path: vars(module).get("forward") for path, module in modules.items()}
    sides = {name: listener.side for name, listener in listeners.items()}

    def stand(path: str, forward: Callable) -> Callable:
        @functools.wraps(forward)  # whoever asks for its signature gets the module's own
        def instead(*args: Any, **kwargs: Any) -> Any:
            return called(path, forward, args, kwargs)

        return instead

    try:
        for path, module in modules.items():
            module.forward = stand(path, module.forward)
        for name, listener in listeners.items():
            listener.side = _Ear(listener.side, functools.partial(heard, name))
        yield
    finally:
        for path, module in modules.items():
            if before[path] is None:
                vars(module).pop("forward", None)
            else:
                module.forward = before[path]
        for name, listener in listeners.items():
            listener.side = sides[name]


class _Counted:
    """How often each module and side network has been called in a step."""

    def __init__(self, model: nn.Module, listeners: Mapping[str, Listener], plan: Plan):
        self.model, self.listeners, self.plan = model, listeners, plan
        self.counts: Counter[str] = Counter()
        self.modules = {path: model.get_submodule(path) for path, _ in plan.calls}

    def next(self, name: str) -> Key:
        self.counts[name] += 1
        return name, self.counts[name] - 1


class _Done(Exception):
    """All that is recorded of a step has been."""


class Recording(_Counted):
    """Runs steps and keeps what a plan names, with samples as the first axis.

    Args:
        model: the model with its task, whose forward takes a batch.
        listeners: of its side networks by name.
        plan: what is kept.
        only: leaves to keep, by name; None for all that are needed.
        skip: calls that need not run, for nothing that is kept depends on them.
    """

    def __init__(self, model: nn.Module, listeners: Mapping[str, Listener], plan: Plan, only: set[str] | None = None,
                 skip: set[Key] | None = None):  # fmt: skip
        super().__init__(model, listeners, plan)
        self.only = {x.name for x in plan.kept()} if only is None else only
        self.skip = skip or set()

    @torch.no_grad()
    def run(self, batch: Values, take: Callable[[Tensor], Tensor] = torch.clone) -> Values:
        """What one batch shows; `take` copies a value, before anything writes into it."""
        self.counts.clear()
        out: Values = {}
        left = self.only - {x.name for x in self.plan.batch}
        rows, device = next((len(v), v.device) for v in batch.values())

        def blank(leaf: Leaf) -> Tensor:
            return leaf.blank(rows, None, None, device, self.plan.dense)

        def keep(leaf: Leaf, value: Tensor) -> None:
            if leaf.name in self.only:
                out[leaf.name] = take(leaf.stored(value.detach()) if leaf.axis is not None else value.detach())
                left.discard(leaf.name)
            if not left:
                raise _Done

        def called(path: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
            key = self.next(path)
            if key in self.skip:
                idle = self.plan.calls[key]
                self.counts.update(idle.inside)
                return tree_unflatten([blank(x) if isinstance(x, Leaf) else x for x in idle.leaves], idle.spec)
            result = forward(*args, **kwargs)
            if call := self.plan.calls.get(key):
                for leaf, value in zip(call.leaves, tree_flatten(result)[0], strict=True):
                    if isinstance(leaf, Leaf):
                        keep(leaf, value)
            return result

        def heard(name: str, seen: Seen, side: nn.Module) -> Any:
            ear = self.plan.heard[self.next(name)]
            for leaf, value in zip(ear.maps, seen.maps, strict=True):
                keep(leaf, value)
            for part, leaf in ear.rest.items():
                keep(leaf, getattr(seen, part))
            if not any(p.requires_grad for p in side.parameters()):
                return side(seen)  # it is a part of what stays
            return seen.value  # the side network itself need not run

        for leaf in self.plan.batch:
            if leaf.name in self.only:
                out[leaf.name] = batch[leaf.name.removeprefix("batch.")].detach().clone()
        try:
            with between(self.modules, called, self.listeners, heard):
                if left:
                    self.model(**batch)
        except _Done:
            pass
        if missing := sorted(left):
            raise ValueError(f"cache: '{missing[0]}' was seen in a first step and not in a later one: the model takes "
                             "another way through its modules; train it without `training.cache`")  # fmt: skip
        return out


class Playing(_Counted):
    """Runs steps on what was recorded of them."""

    def __init__(self, model: nn.Module, listeners: Mapping[str, Listener], plan: Plan):
        super().__init__(model, listeners, plan)
        self.given: dict[Key, Result] = {}

    def run(self, values: Values, rows: int) -> Any:
        """The model's own result of a batch.

        Args:
            values: leaves by name, those that are needed; their first axis is the sample.
            rows: samples of the batch.
        """
        self.counts.clear()
        self.given.clear()
        device = next(iter(values.values())).device
        length = self._length(values)

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, Leaf):
                return leaf
            if leaf.fixed is not None:
                return leaf.fixed
            if leaf.name in values:
                found = values[leaf.name]
                return leaf.handed(found) if leaf.axis is not None else found
            return leaf.blank(rows, length, self.plan.length, device, self.plan.dense)

        def called(path: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
            call = self.plan.calls.get(self.next(path))
            if call is None:
                return forward(*args, **kwargs)
            self.counts.update(call.inside)
            return tree_unflatten([value(leaf) for leaf in call.leaves], call.spec)

        def heard(name: str, seen: Seen, side: nn.Module) -> Any:
            key = name, self.counts[name] - 1
            out = side(seen)
            self.given[key] = Result(out, seen.mask, ())
            return out

        def show(name: str) -> Seen:
            ear = self.plan.heard[self.next(name)]
            seen = Seen([value(leaf) for leaf in ear.maps], None, None, None)  # type: ignore[arg-type]
            for part, leaf in ear.rest.items():
                setattr(seen, part, value(leaf))
            if read := joined([self.given[key] for key in ear.memory]):
                seen.memory, seen.memory_mask = read.tokens, read.mask
            return seen

        batch = {leaf.name.removeprefix("batch."): value(leaf) for leaf in self.plan.batch}
        try:
            for name, listener in self.listeners.items():
                listener.source = functools.partial(show, name)
            with between(self.modules, called, self.listeners, heard):
                return self.model(**batch)
        finally:
            for listener in self.listeners.values():
                listener.source = None
            self.given.clear()

    def _length(self, values: Values) -> int | None:
        """Of this batch's texts."""
        if self.plan.length is None:
            return None
        for leaf in self.plan.leaves():
            if leaf.name in values and leaf.texts and leaf.axis is not None:
                axis = leaf.text_axes[0]
                return self.plan.length + values[leaf.name].shape[axis] - leaf.shape[leaf.texts[0]]
        return self.plan.length
