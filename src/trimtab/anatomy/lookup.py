"""Where the anatomy of a model comes from: registered by its class, or discovered from its repeated blocks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from trimtab.anatomy.description import FINDERS, Anatomy, AnatomyError, Block, Modality, Tap, Tower
from trimtab.anatomy.structure import repeated

# --- registered descriptions ------------------------------------------------------------------------------------------

_DESCRIPTIONS: dict[str, Callable[[Any], Anatomy]] = {}


def describes(*class_names: str) -> Callable[[Callable[[Any], Anatomy]], Callable[[Any], Anatomy]]:
    """Register a function that describes models of these classes, named so that no class need be imported."""

    def add(function: Callable[[Any], Anatomy]) -> Callable[[Any], Anatomy]:
        for name in class_names:
            _DESCRIPTIONS[name] = function
        return function

    return add


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


def _registered(model: nn.Module) -> Anatomy | None:
    _load_descriptions()
    for kind in type(model).__mro__:
        if kind.__name__ in _DESCRIPTIONS:
            return replace(_DESCRIPTIONS[kind.__name__](model), source=f"registered for {kind.__name__}")
    # A task model of transformers holds its base model under a known name; everything beside it is a head. So it is for
    # any module with one described model in it, if nothing beside that has blocks of its own.
    children = dict(model.named_children())
    prefix = getattr(model, "base_model_prefix", "")
    bases = [prefix] if prefix in children else list(children)
    inner = {n: found for n in bases if (found := _registered(children[n]))}
    others = tuple(n for n in children if n not in inner)
    if len(inner) != 1 or (prefix not in inner and any(list(repeated(children[n])) for n in others)):
        return None
    ((name, found),) = inner.items()
    outer = found.prefixed(name)
    return replace(outer, heads=outer.heads + others)


def part_of(model: nn.Module, path: str, name: Modality) -> Anatomy:
    """The anatomy of a submodule that is one tower, whichever class it has, to describe the model that holds it.

    Args:
        model: the whole.
        path: of the submodule; the paths that are returned begin with it.
        name: of the tower, and its modality.

    Raises:
        AnatomyError: if the submodule is described, or discovered, as several towers.
    """
    found = Anatomy.of(model.get_submodule(path))
    if len(found.towers) != 1:
        towers = ", ".join(t.name for t in found.towers)
        raise AnatomyError(f"'{path}' was expected to be one tower ({name}), found {towers} ({found.source})")
    return replace(found, towers=(replace(found.towers[0], name=name, modality=name),)).prefixed(path)


# --- discovery --------------------------------------------------------------------------------------------------------

_VISION = re.compile(r"vis|image|img|patch|pixel|vit|swin|resnet|conv|stage")
_TEXT = re.compile(r"text|lang|bert|gpt|t5|llama|decoder|word|token|lm")
_FUSION = re.compile(r"cross|fusion|joint|multi_?modal|lxmert|qformer")


def discover(model: nn.Module) -> Anatomy | None:
    """Every list of repeated blocks as a tower; None if there is none."""
    towers: list[Tower] = []
    for path, children in repeated(model):
        lowered = f"{path} {type(model.get_submodule(children[0])).__name__}".lower()
        modality: Modality = "vision"
        for name, pattern in (("fusion", _FUSION), ("vision", _VISION), ("text", _TEXT)):
            if pattern.search(lowered):
                modality = name  # type: ignore[assignment]
                break
        modules = [model.get_submodule(c) for c in children]
        widths = [_width(m) for m in modules]
        grid = any(isinstance(m, nn.Conv2d) for m in modules[0].modules()) and not any(
            isinstance(m, nn.Linear) for m in modules[0].modules()
        )
        blocks = tuple(Block(c, w, keeps_shape=len(set(widths)) == 1) for c, w in zip(children, widths, strict=True))
        towers.append(Tower(path or modality, modality, blocks, (path,) if path else tuple(children),
                            Tap(children[-1]), "grid" if grid else "tokens"))  # fmt: skip
    if not towers:
        return None
    return Anatomy(tuple(towers), source=f"discovered in {type(model).__name__}; check it")


def _width(block: nn.Module) -> int:
    """Channels that a block puts out: those of its first norm if it has one, else of its last linear or convolution."""
    last = 0
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            return module.normalized_shape[-1]
        if type(module).__name__.endswith("RMSNorm"):
            return next(module.parameters()).numel()
        last = getattr(module, "out_features", getattr(module, "out_channels", last))
    return last


FINDERS.extend((_registered, discover))
