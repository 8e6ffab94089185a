"""A family of backbones in one record: all that the rest of the library asks of it.

backbones/<family>/__init__.py    FAMILY = Family(...)                      one line in `backbones/__init__.py`
                   describe.py    what methods see: the anatomy             imported with the folder
                   features.py    what tasks see: a `Backbone`              imported with the folder
                   official.py    its authors' files, its sizes             imported with the folder
                   model.py       classes that transformers does not have   imported when one is asked for
                   examples.py    EXAMPLES, tiny models for the matrix      imported when they are asked for
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from trimtab.registry import unknown

if TYPE_CHECKING:
    from trimtab.backbones.base import Backbone
    from trimtab.backbones.examples import Example
    from trimtab.backbones.official import Format

T = TypeVar("T")


@dataclass(frozen=True)
class Family:
    """A family of backbones. Whatever it does not have is left out.

    Attributes:
        name: of the family, of its architecture and of its file format.
        title: the family's name as people write it.
        package: `__name__` of its folder.
        folders: model type in the config of a transformers folder -> function of (folder, name, whether weights are
            wanted) that gives the `Backbone`.
        pretrained: name of weights that come with trimtab or with a package -> function of whether they are wanted
            (else fresh random ones) that gives the `Backbone`; the first line of its docstring says what they are.
        architecture: function of settings that gives the model's class and config at its published sizes.
        format: how its authors' files are read.
        features: function of (name, model, tokenizer) that makes a model from such a file, or of the architecture, a
            `Backbone`; it raises a ValueError for a model that no task can use.
        own: names of its model classes that transformers does not have; they stand in `model.py`.
    """

    name: str
    title: str
    package: str
    folders: Mapping[str, Callable[[Path, str, bool], Backbone]] = field(default_factory=dict)
    pretrained: Mapping[str, Callable[[bool], Backbone]] = field(default_factory=dict)
    architecture: Callable[..., tuple[type, Any]] | None = None
    format: Format | None = None
    features: Callable[[str, Any, Any], Backbone] | None = None
    own: tuple[str, ...] = ()

    @property
    def examples(self) -> Mapping[str, Example]:
        """Name -> tiny model, for the matrix of methods and backbones and for tests; empty without `examples.py`."""
        module = f"{self.package}.examples"
        return importlib.import_module(module).EXAMPLES if find_spec(module) else {}

    def own_class(self, name: str) -> type:
        """One of its own model classes; importing it also makes its config known to transformers' `AutoConfig`."""
        return getattr(importlib.import_module(f"{self.package}.model"), name)

    def backbone(self, name: str, model: nn.Module, tokenizer: Any = None) -> Backbone:
        """A model from an official file, or of the architecture, for tasks.

        Raises:
            ValueError: if the family, or this model of it, has no tasks.
        """
        if self.features is None:
            raise ValueError(
                f"{name}: {self.title} has no tasks of ours yet; `trimtab.backbones.load_model` gives it plain"
            )
        return self.features(name, model, tokenizer)


FAMILIES: dict[str, Family] = {}
"""All families by name, in the order in which they were added."""


def add(family: Family) -> None:
    """Make a family known; another package does the same in a module that its entry point `trimtab.descriptions` names.

    Raises:
        ValueError: if its name, or a name in it, is taken by another family.
    """
    if family.name in FAMILIES:
        raise ValueError(f"family {family.name!r} is added twice, from {FAMILIES[family.name].package} and "
                         f"{family.package}")  # fmt: skip
    for there in FAMILIES.values():
        for what in ("folders", "pretrained", "own"):
            if taken := sorted(set(getattr(family, what)) & set(getattr(there, what))):
                raise ValueError(f"{family.package}: {what} {taken[0]!r} is that of {there.package} already")
    FAMILIES[family.name] = family


class View(Mapping[str, T]):
    """One thing of all families by its name, always as `FAMILIES` has them now; a wrong name gets the nearest ones.

    Args:
        kind: what the things are, for messages.
        entries: family -> its things by name.
        beside: things of the kind that belong to no family.
    """

    def __init__(self, kind: str, entries: Callable[[Family], Mapping[str, T]], beside: Mapping[str, T] | None = None):
        self.kind, self.entries, self.beside = kind, entries, beside or {}

    def _all(self) -> dict[str, T]:
        found = {name: item for family in FAMILIES.values() for name, item in self.entries(family).items()}
        return {**found, **self.beside}

    def __getitem__(self, name: str) -> T:
        """The thing of that name; ValueError if there is none."""
        found = self._all()
        if name not in found:
            raise ValueError(unknown(self.kind, name, sorted(found)))
        return found[name]

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def model_class(name: str) -> Any:
    """The model class of that name, a family's own or transformers'; None if neither has it."""
    import transformers

    for family in FAMILIES.values():
        if name in family.own:
            return family.own_class(name)
    return getattr(transformers, name, None)
