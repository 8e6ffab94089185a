"""What is recorded of a step: calls of modules, what side networks are shown, and the tensors in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten

from trimtab.methods.tune.listener import Seen

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
