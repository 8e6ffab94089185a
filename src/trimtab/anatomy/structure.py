"""What can be told from a model's module tree alone: repeated blocks, wrappers, and what was added to it.

Weights are named by *plain paths*: the names that they have in the plain model, before LoRA wrapped a layer (PEFT keeps
the layer as `base_layer` in its wrapper) and without what trimtab added. Masks and scores keep plain paths, so that
they follow their matrices wherever these go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

_ADDED = "_trimtab_added"
HANDLE = "_trimtab_fit"  # under which an adapted model holds its handle
_WRAPS = "_trimtab_wraps"
# Under which name PEFT keeps the plain module, and beside which other: in its layers, and where it trains a copy.
_INNER = {"base_layer": None, "original_module": "modules_to_save"}


class AnatomyError(ValueError):
    """A description that does not fit its model; the message names the path, what was expected and what is there."""


def repeated(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Outermost lists of two or more modules of one class that hold weights: (path, paths of the children).

    What methods added is left out, and a layer that PEFT wrapped counts as the layer itself; the paths are plain paths.
    """
    found: list[str] = []
    for path, module in plain_modules(model):
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(not f or under(path, [f]) for f in found):
            continue
        children = {f"{path}.{n}".lstrip("."): c for n, c in module.named_children() if added_by(c) is None}
        kinds = {type(plain_module(c, "")) for c in children.values()}
        weighty = any(multiplies(m) for c in children.values() for inner, m in plain_modules(c) if inner)
        if len(children) >= 2 and len(kinds) == 1 and weighty:
            found.append(path)
            yield path, list(children)


def multiplies(module: nn.Module) -> bool:
    """Whether a module multiplies by weights: linear, convolution, or transformers' transposed linear (`Conv1D`)."""
    return isinstance(module, nn.Conv2d) or is_linear(module)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, transformers' transposed one (`Conv1D`, weight (in, out)) among them."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, by its name: a class of one's own so called may be a convolution."""
    return type(module).__name__ == "Conv1D" and getattr(getattr(module, "weight", None), "ndim", 0) == 2


def under(path: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted path is one of `prefixes`, or stands below one."""
    return any(path == p or path.startswith(p + ".") for p in prefixes)


# --- what was added ---------------------------------------------------------------------------------------------------


def mark_added(module: nn.Module, by: str) -> nn.Module:
    """Note that a method added this module (an adapter, a side network): it is no part of the plain model."""
    setattr(module, _ADDED, by)
    return module


def added_by(module: nn.Module) -> str | None:
    """Name of the method that added a module; None if it belongs to the plain model."""
    return getattr(module, _ADDED, None)


def mark_wraps(module: nn.Module, child: str) -> nn.Module:
    """Note that a module stands around one of the plain model, its child of that name, which keeps its plain path.

    Everything else in the module is no part of the plain model.
    """
    setattr(module, _WRAPS, child)
    return module


def plain_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(plain path, module) of everything that belongs to the plain model, in the order of `named_modules`.

    What methods added is left out; of a layer that PEFT wrapped, the layer itself comes under its own path. Every
    module comes once, under its first path.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if added_by(module) is not None or id(module) in seen:
            return
        seen.add(id(module))
        if (inner := _inner(module)) is not None:
            yield from walk(inner, path)
            return
        yield path, module
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}" if path else name)

    yield from walk(model, path)


def _inner(module: nn.Module) -> nn.Module | None:
    """What a wrapper (PEFT's, or a marked one) holds of the plain model; None if the module is no wrapper."""
    if (child := getattr(module, _WRAPS, None)) is not None:
        return module.get_submodule(child)
    for name, beside in _INNER.items():
        if name in module._modules and (beside in module._modules if beside else hasattr(module, "get_base_layer")):
            return module.get_submodule(name)
    return None


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module is a wrapper (PEFT's, or a marked one), which holds the plain module beside what it adds."""
    return _inner(module) is not None


def trained_copies(model: nn.Module) -> list[str]:
    """Paths of modules of which PEFT trains a copy (`modules_to_save`): the plain module is there, but not used."""
    return [path for path, m in model.named_modules() if "original_module" in m._modules and is_wrapped(m)]


def module_at(model: nn.Module, path: str) -> nn.Module:
    """What stands at a plain path: the layer, or the wrapper around it, whose result the model goes on with.

    Raises:
        AttributeError: if the model has no such module.
    """
    module = model
    for name in path.split(".") if path else ():
        while name not in module._modules and (inner := _inner(module)) is not None:
            module = inner
        module = module.get_submodule(name)
    return module


def plain_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a plain path, behind the wrappers around it; AttributeError if there is none."""
    module = _unwrap(model)
    for name in path.split(".") if path else ():
        module = _unwrap(module.get_submodule(name))
    return module


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put another module at a dotted path."""
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, new)


def _unwrap(module: nn.Module) -> nn.Module:
    while (inner := _inner(module)) is not None:
        module = inner
    return module


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Plain path -> parameter, of the plain model alone; a tied parameter stands under each of its names."""
    return {
        f"{path}.{name}".lstrip("."): parameter
        for path, module in plain_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


# --- wrappers around the whole model ----------------------------------------------------------------------------------

# Class and package of a wrapper -> what to do. They are told by name, so that nothing is imported to look for them.
_BEFORE = "adapt the model inside (`{inside}`) first, then wrap it"
_WRAPPERS = {
    ("OptimizedModule", "torch"): "adapt the model inside (`model._orig_mod`) first, then call `torch.compile`",
    ("DistributedDataParallel", "torch"): _BEFORE.format(inside="model.module"),
    ("FullyShardedDataParallel", "torch"): _BEFORE.format(inside="model.module"),
    ("DataParallel", "torch"): "adapt the model inside (`model.module`), then wrap it in DistributedDataParallel, one "
    "process a GPU: hooks and masks do not reach DataParallel's replicas",
    ("DeepSpeedEngine", "deepspeed"): _BEFORE.format(inside="model.module"),
}  # fmt: skip


def refuse_wrapper(model: nn.Module) -> None:
    """AnatomyError if a model is wrapped (compiled, parallel, sharded): its paths and calls are not the model's own."""
    for (name, package), what_to_do in _WRAPPERS.items():
        if _is(model, name, package):
            raise AnatomyError(f"the model is wrapped in {name}, expected the model itself: {what_to_do}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain model: what a `PeftModel` holds, any other model as it is.

    A model that Accelerate prepared in one process, or whose `compile` method was called, is no wrapper.

    Raises:
        AnatomyError: if it is wrapped by `torch.compile`, DistributedDataParallel, DataParallel, FSDP or DeepSpeed.
    """
    refuse_wrapper(model)
    if _is(model, "PeftModel", "peft"):
        return unwrapped(model.get_base_model())  # type: ignore[operator]
    if _is(model, "BaseTuner", "peft"):  # LoraModel and the like, without the PeftModel around it
        return unwrapped(model.model)  # type: ignore[arg-type]
    return model


def _is(model: nn.Module, name: str, package: str) -> bool:
    return any(k.__name__ == name and k.__module__.split(".")[0] == package for k in type(model).__mro__)
