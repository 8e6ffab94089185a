"""Names of things (backbones, methods, tasks, data kinds) and the errors that a wrong name gets."""

from __future__ import annotations

import difflib
from collections.abc import Callable, ItemsView, Iterable, Iterator
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")
Item = TypeVar("Item")


def unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    """The message for a name that is not one of `valid`: the nearest names first, then all of them."""
    valid = list(valid)
    near = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"unknown {kind} {name!r}: {hint}valid: {', '.join(valid) or 'none'}"


class Registry(Generic[T]):
    """A table of named things of one kind, filled by decorators where the things are defined."""

    def __init__(self, kind: str):
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Item], Item]:
        """A decorator that adds its argument under `name`; a class gets the name as its attribute `name`.

        Raises:
            ValueError: if the name is taken.
        """

        def add(item: Item) -> Item:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = cast(T, item)
            if isinstance(item, type):
                cast(Any, item).name = name
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise ValueError(unknown(self.kind, name, sorted(self._items)))
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def items(self) -> ItemsView[str, T]:
        return self._items.items()
