"""Where the weights that masks name stand in a model now.

    path "layers.5.fc.weight"  ->  the module that holds it, and the parameter's name in it

A weight is found by its plain path in the plain model, which may be held by a wrapper or a model with its task. Where
masks are applied, every module also gets a note with the path of its mask: it goes with the module through deep copies,
LoRA's wrapping, and the new numbers that blocks get when others are taken out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from trimtab.anatomy.structure import plain_module, plain_modules
from trimtab.registry import unknown

_NOTES = "_trimtab_masked"  # attribute of a module: (mark of the masks, parameter's name) -> path of the mask

Place = tuple[nn.Module, str]  # a module, and the name of one of its parameters


@dataclass
class Places:
    """Where weights stand in a model.

    Attributes:
        found: path -> its places: one, or one in each copy of the model that carries the note.
        missing: paths that the model lacks.
        noted: whether the masks were applied to this model.
        root: the module to which the other paths belong.
    """

    found: dict[str, list[Place]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    noted: bool = False
    root: nn.Module | None = None


def note(model: nn.Module, places: Places, mark: str) -> None:
    """Write on each module which of its parameters has which mask; on modules that share the parameter too, so that its
    mask is known when the block that gave its path is taken out."""
    paths = {id(module._parameters[name]): path for path, several in places.found.items() for module, name in several}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in paths:
                vars(module).setdefault(_NOTES, {})[mark, name] = paths[id(parameter)]


def find(model: nn.Module, shapes: Mapping[str, torch.Size], mark: str, paths: bool = True) -> Places:
    """Find weights by the notes that `note` wrote, and if `paths` those without one by their paths.

    Raises:
        ValueError: if a weight has another shape, or more than one module inside the model has these paths.
    """
    places = Places()
    for module in model.modules():
        for (owner, name), path in vars(module).get(_NOTES, {}).items():
            if owner == mark and path in shapes and module._parameters.get(name) is not None:
                places.found.setdefault(path, []).append((module, name))
    places.noted = bool(places.found)
    rest = [path for path in shapes if path not in places.found] if paths else []
    if rest:
        places.root = _holder(model, {path: shapes[path] for path in rest})
        for path in rest:
            place = _at(places.root, path)
            # A block that got the number of one that is gone carries a note of its own: it is not the one asked for.
            if place is None or (mark, place[1]) in vars(place[0]).get(_NOTES, {}):
                places.missing.append(path)
            else:
                places.found[path] = [place]
    for path, several in places.found.items():
        for module, name in several:
            shape = module._parameters[name].shape  # type: ignore[union-attr]
            if shape != shapes[path]:
                raise ValueError(
                    f"these masks are for another model: '{path}' has the shape {tuple(shape)}, its mask "
                    f"{tuple(shapes[path])}; load the checkpoint that they were found on, or prune this one"
                )
    return places


def check_complete(model: nn.Module, places: Places) -> None:
    """Raise a ValueError if the model lacks a weight, and nothing says that its block was taken out."""
    if places.missing and not places.noted:
        names = [n for n, _ in (model if places.root is None else places.root).named_parameters()]
        raise ValueError(
            "these masks are for another model, or a block was removed: "
            f"{unknown('parameter', places.missing[0], names)[:300]}; masks of what this model has: "
            "Masks.read(...).restricted_to(model)"
        )


def check_numbers(places: Places) -> None:
    """Raise a ValueError if weights are missing at the end of a list: then its blocks may have other numbers now."""
    for path in places.missing if not places.noted else ():
        module, names = places.root, path.split(".")
        for i, name in enumerate(names):
            if module is None or name not in module._modules:
                if isinstance(module, (nn.ModuleList, nn.Sequential)) and name.isdigit():
                    raise ValueError(
                        f"'{'.'.join(names[:i])}' has {len(module)} blocks and these masks have one for number {name}: "
                        "which blocks are gone, and which numbers the others had, cannot be told. Restrict the masks "
                        "to a model to which they were applied before its blocks were taken out, or name the blocks: "
                        "`masks.without([...])`"
                    )
                break
            module = module._modules[name]


def current_paths(model: nn.Module, places: Places) -> dict[str, str]:
    """Path of each mask -> plain path that its weight has in this model today, where blocks may have other numbers."""
    names = {id(module): path for path, module in plain_modules(model)}
    out = {}
    for path, ((module, name), *_) in places.found.items():
        today = f"{names[id(module)]}.{name}" if id(module) in names else path
        out[path] = path if f".{today}".endswith(f".{path}") else today
    return out


def _holder(model: nn.Module, shapes: Mapping[str, torch.Size]) -> nn.Module:
    """The module to which paths belong: the model itself, or the one inside it that has most of them."""

    def score(module: nn.Module) -> tuple[int, int]:
        found = [(path, p) for path in shapes if (p := _at(module, path)) is not None]
        return sum(m._parameters[n].shape == shapes[path] for path, (m, n) in found), len(found)  # type: ignore[union-attr]

    best, most = model, score(model)
    if most[0] == len(shapes):
        return model
    heads = {path.split(".")[0] for path in shapes}
    rival = None
    for module in model.modules():
        if module is model or not heads & module._modules.keys():
            continue
        found = score(module)
        if found > most:
            best, most, rival = module, found, None
        elif found == most and found[1] and not _same(best, module, shapes):
            rival = module
    if rival is not None:
        names = {m: n for n, m in model.named_modules()}
        raise ValueError(
            f"these masks fit '{names[best]}' and '{names[rival]}' in this {type(model).__name__} alike: give the "
            "plain model that they were found on"
        )
    return best


def _same(one: nn.Module, other: nn.Module, paths: Iterable[str]) -> bool:
    """Whether two modules share the weights of these paths."""
    for path in paths:
        a, b = _at(one, path), _at(other, path)
        if a is not None and b is not None and a[0]._parameters[a[1]] is not b[0]._parameters[b[1]]:
            return False
    return True


def _at(root: nn.Module, path: str) -> Place | None:
    """The place of a plain path; None if there is no such parameter."""
    owner, _, name = path.rpartition(".")
    try:
        module = plain_module(root, owner)
    except AttributeError:
        return None
    return (module, name) if module._parameters.get(name) is not None else None
