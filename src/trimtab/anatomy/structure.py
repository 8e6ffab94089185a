"""What can be told from a model's module tree alone: repeated blocks, wrappers, and what was added to it.

Weights are named by *plain paths*: the names that they have in the plain model, before LoRA wrapped a layer (PEFT keeps
the layer as `base_layer` in its wrapper) and without what trimtab added. Masks and scores keep plain paths, so that they
follow their matrices wherever these go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

_ADDED = "_trimtab_added"
_BASE = "base_layer"  # under which PEFT's layers keep the layer that they wrap


def repeated(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Outermost lists of two or more modules of one class that hold weights: (path, paths of the children)."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(path.startswith(f + ".") for f in found):
            continue
        children = [(f"{path}.{n}".lstrip("."), c) for n, c in module.named_children()]
        kinds = {type(c) for _, c in children}
        weighty = any(_matrices(m) for _, c in children for m in list(c.modules())[1:])
        if len(children) >= 2 and len(kinds) == 1 and weighty:
            found.append(path)
            yield path, [p for p, _ in children]


def _matrices(module: nn.Module) -> bool:
    """Whether a module multiplies by weights: linear, convolution, or transformers' transposed linear (`Conv1D`)."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "Conv1D"


def under(path: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted path is one of `prefixes`, or stands below one."""
    return any(path == p or path.startswith(p + ".") for p in prefixes)


# --- what was added -----------------------------------------------------------------------------------------------------


def mark_added(module: nn.Module, by: str) -> nn.Module:
    """Note that a method added this module (an adapter, a side network): it is no part of the plain model."""
    setattr(module, _ADDED, by)
    return module


def added_by(module: nn.Module) -> str | None:
    """Name of the method that added a module; None if it belongs to the plain model."""
    return getattr(module, _ADDED, None)


def plain_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(plain path, module) of everything that belongs to the plain model, in the order of `named_modules`.

    What methods added is left out; of a layer that PEFT wrapped, the layer itself comes under its own path. Every module
    comes once, under its first path.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if added_by(module) is not None or id(module) in seen:
            return
        seen.add(id(module))
        if is_wrapped(module):
            yield from walk(module.get_submodule(_BASE), path)
            return
        yield path, module
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    yield from walk(model, path)


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers, which hold the plain layer beside what they add."""
    return _BASE in module._modules and hasattr(module, "get_base_layer")


def plain_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a plain path, behind the wrappers around it; AttributeError if there is none."""
    module = model
    for name in path.split(".") if path else ():
        while is_wrapped(module):
            module = module.get_submodule(_BASE)
        module = module.get_submodule(name)
    while is_wrapped(module):
        module = module.get_submodule(_BASE)
    return module


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Plain path -> parameter, of the plain model alone; a tied parameter stands under each of its names."""
    return {
        f"{path}.{name}".lstrip("."): parameter
        for path, module in plain_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
