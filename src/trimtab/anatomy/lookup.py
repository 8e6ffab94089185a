"""Where the anatomy of a model comes from: registered by its class, seen on an example, or its lists of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from trimtab.anatomy.description import FINDERS, Anatomy
from trimtab.anatomy.parts import Block, Modality, Tap, Tower
from trimtab.anatomy.seen.inputs import made_inputs
from trimtab.anatomy.seen.watch import watch
from trimtab.anatomy.structure import AnatomyError, added_by, plain_module, repeated

# --- registered descriptions ------------------------------------------------------------------------------------------

Describe = Callable[[Any], Anatomy]


@dataclass(frozen=True)
class _Description:
    """A function that describes models of a class; `packages` that the class may come from, all if empty."""

    function: Describe
    packages: tuple[str, ...]

    def fits(self, kind: type) -> bool:
        return not self.packages or _package(kind) in self.packages

    def meets(self, other: _Description) -> bool:
        """Whether some class could have both."""
        return not self.packages or not other.packages or not set(self.packages).isdisjoint(other.packages)

    def __str__(self) -> str:
        of = f" (of {', '.join(self.packages)})" if self.packages else ""
        return f"{self.function.__module__}.{self.function.__qualname__}{of}"


_DESCRIPTIONS: dict[str, list[_Description]] = {}


def describes(*class_names: str, packages: Iterable[str] | None = None) -> Callable[[Describe], Describe]:
    """Register a function that describes models of these classes, named so that no class need be imported.

    Args:
        class_names: names of classes; models of their subclasses are described too.
        packages: top-level packages that the classes may come from, so that a class of the same name from elsewhere is
            not taken for one of them. None: any; for trimtab's own descriptions `transformers` and `trimtab`.

    Raises:
        AnatomyError: if a class is described twice, trimtab's own descriptions among them. Defining the same function
            again replaces it (a notebook's cell).
    """

    def add(function: Describe) -> Describe:
        own = _root(function.__module__) == "trimtab"
        if not own:
            _load_descriptions()  # so that a name that trimtab describes is refused here, not where it is looked up
        default = ("transformers", "trimtab") if own else ()
        new = _Description(function, tuple(default if packages is None else packages))
        kept = {n: [d for d in _DESCRIPTIONS.get(n, []) if not _same(d.function, function)] for n in class_names}
        for name, others in kept.items():
            if old := next((d for d in others if d.meets(new)), None):
                raise AnatomyError(
                    f"{name!r} is described twice: by {old} and by {new}; name in `packages` from which package the "
                    f"class comes that each is for, such as @describes({name!r}, packages=['mypackage'])"
                )
        _DESCRIPTIONS.update({name: [*others, new] for name, others in kept.items()})
        return function

    return add


def described() -> Iterator[tuple[str, Describe]]:
    """(class name, the function that describes it) of everything that is registered."""
    _load_descriptions()
    for name, found in _DESCRIPTIONS.items():
        yield from ((name, d.function) for d in found)


def _same(a: Describe, b: Describe) -> bool:
    return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)


def _root(module: str) -> str:
    return module.partition(".")[0]


def _package(kind: type) -> str:
    return _root(kind.__module__)


@cache
def _load_descriptions() -> None:
    """Import the modules that packages name in their entry points `trimtab.descriptions`: they call `describes`.

    trimtab's own are found in the same way, so that the seam knows no model. Any other package may add some.
    """
    found = entry_points(group="trimtab.descriptions")
    if "trimtab" not in found.names:
        raise AnatomyError(
            "trimtab's own descriptions of models are not found: the package is on the path but not installed, or an "
            "old version is; install it (pip install -e .)"
        )
    for entry in found:
        entry.load()


def _registered(model: nn.Module, path: str = "") -> Anatomy | None:
    """The description of a model, which stands at `path` of the one that is asked about, or of the base model in it."""
    _load_descriptions()
    if (found := _by_class(model, path)) is not None:
        return found
    # A task model of transformers holds its base model under a known name; everything beside it is a head. So it is for
    # any module with one described model in it, if nothing beside that has blocks of its own.
    children = {n: c for n, c in model.named_children() if added_by(c) is None}
    prefix = getattr(model, "base_model_prefix", "")
    bases = [prefix] if prefix in children else list(children)
    inner = {n: found for n in bases if (found := _registered(children[n], f"{path}.{n}".lstrip(".")))}
    others = tuple(n for n in children if n not in inner)
    if len(inner) != 1 or (prefix not in inner and any(list(repeated(children[n])) for n in others)):
        return None
    ((name, found),) = inner.items()
    outer = found.prefixed(name)
    return replace(outer, heads=outer.heads + others)


def _by_class(model: nn.Module, path: str) -> Anatomy | None:
    """The description that is registered for a class of the model, the nearest first.

    Raises:
        AnatomyError: if only classes of that name from elsewhere are described, or if the description fails.
    """
    foreign: type | None = None
    for kind in type(model).__mro__:
        found = _DESCRIPTIONS.get(kind.__name__, [])
        if one := next((d for d in found if d.fits(kind)), None):
            return _described(one, kind, model, path)
        if found and foreign is None:
            foreign = kind
    if foreign is None:
        return None
    name, package = foreign.__name__, _package(foreign)
    known = "; ".join(map(str, _DESCRIPTIONS[name]))
    raise AnatomyError(
        f"{_where(path)} is of the class {foreign.__module__}.{name}, and only classes of that name from "
        f"elsewhere are described: by {known}. Register a description of yours with "
        f"@trimtab.describes({name!r}, packages=[{package!r}]), or give the class another name"
    )


def _described(one: _Description, kind: type, model: nn.Module, path: str) -> Anatomy:
    try:
        return replace(one.function(model), source=f"registered for {kind.__name__}")
    except (AttributeError, KeyError, IndexError) as error:
        what = f"{_where(path)}, a {kind.__module__}.{kind.__name__}"
        raise AnatomyError(
            f"the description {one} does not fit {what}: {type(error).__name__}: {error}. Correct the "
            "description; if it was written for another class or version, describe this class under a name of its own"
        ) from error


def _where(path: str) -> str:
    return f"'{path}'" if path else "the model"


def part_of(model: nn.Module, path: str, name: Modality) -> Anatomy:
    """The anatomy of a submodule that is one tower, whichever class it has, to describe the model that holds it.

    Args:
        model: the whole.
        path: of the submodule; the paths that are returned begin with it.
        name: of the tower, and its modality.

    Raises:
        AnatomyError: if the submodule is described, or discovered, as several towers.
    """
    found = Anatomy.of(plain_module(model, path))
    if len(found.towers) != 1:
        towers = ", ".join(t.name for t in found.towers)
        raise AnatomyError(f"'{path}' was expected to be one tower ({name}), found {towers} ({found.source})")
    return replace(found, towers=(replace(found.towers[0], name=name, modality=name),)).prefixed(path)


# --- models that nobody described -------------------------------------------------------------------------------------


def described_by_hand(model: nn.Module, example: Mapping[str, Any] | None) -> Anatomy | None:
    """The registered description; what is seen overrides none, but an example makes known what it leaves open."""
    found = _registered(model)
    return None if found is not None and example is not None and found.unknown() else found


def seen(model: nn.Module, example: Mapping[str, Any] | None) -> Anatomy | None:
    """What is seen when the model runs on the example, or on inputs made from its configuration; without either, or if
    those do not serve, its lists of blocks alone."""
    if example is not None:
        return watch(model, example)
    if (made := made_inputs(model)) is None:
        return lists_of_blocks(model, "the model was not seen at work")
    try:
        return watch(model, made)
    except AnatomyError as error:
        return lists_of_blocks(model, f"inputs made from its configuration do not show it at work ({error})")


def lists_of_blocks(model: nn.Module, why: str) -> Anatomy | None:
    """Every list of repeated blocks as a tower, of which nothing else is known; None if there is none.

    Args:
        model: any module.
        why: nothing else is known.
    """
    towers: list[Tower] = []
    unknown = tuple((fact, why) for fact in ("blocks", "layout", "mask", "causal", "samples", "modality"))
    for path, children in repeated(model):
        blocks = tuple(Block(c, 0) for c in children)
        towers.append(Tower(_name(path or "tower", towers), "fusion", blocks, (path,) if path else tuple(children),
                            Tap(children[-1]), unknown=unknown))  # fmt: skip
    if not towers:
        return None
    return Anatomy(tuple(towers), source=f"lists of blocks in {type(model).__name__}: {why}")


def _name(path: str, towers: list[Tower]) -> str:
    """A name under which modules can be stored: the path without its dots, a number behind it if it is taken."""
    name = stem = path.replace(".", "_")
    count = 1
    while hasattr(nn.ModuleDict, name) or any(t.name == name for t in towers):
        count += 1
        name = f"{stem}_{count}"
    return name


FINDERS.extend((described_by_hand, seen))
