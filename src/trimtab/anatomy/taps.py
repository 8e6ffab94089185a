"""Taps: reading and rewriting values inside a forward pass from outside, with forward hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab.anatomy.description import AnatomyError, Tap


def pick(value: Any, key: int | str) -> Any:
    """The element of a module's output that a tap names."""
    if isinstance(value, Tensor) or value is None:
        return value
    return value[key] if not isinstance(key, str) or hasattr(value, "keys") else getattr(value, key)


def put(value: Any, key: int | str, new: Any) -> Any:
    """The module's output with that element replaced, of the same kind."""
    if isinstance(value, Tensor):
        return new
    if hasattr(value, "_fields"):  # a named tuple
        return value._replace(**{key if isinstance(key, str) else value._fields[key]: new})
    if isinstance(value, (tuple, list)):
        items = list(value)
        items[key] = new  # type: ignore[index]
        return type(value)(items)
    name = list(value.keys())[key] if isinstance(key, int) else key  # a dict or a ModelOutput
    value[name] = new
    return value


class _Read:
    """A hook that gives a tapped value to `then`; copied with the model, it calls the copy's."""

    def __init__(self, tap: Tap, then: Callable[[Tensor], None]):
        self.tap, self.then = tap, then

    def output(self, module: nn.Module, args: tuple, out: Any) -> None:
        self._give(pick(out, self.tap.key))

    def input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._give(argument(self.tap, args, kwargs))

    def _give(self, value: Any) -> None:
        self.then(value.flatten(1) if self.tap.flat and isinstance(value, Tensor) else value)


class _Rewrite:
    """A hook that puts `change(output)` in an output's place; copied with the model, it calls the copy's."""

    def __init__(self, tap: Tap, change: Callable[[Tensor], Tensor]):
        self.tap, self.change = tap, change

    def __call__(self, module: nn.Module, args: tuple, out: Any) -> Any:
        return put(out, self.tap.key, self.change(pick(out, self.tap.key)))


def read(model: nn.Module, tap: Tap, then: Callable[[Tensor], None]) -> RemovableHandle:
    """Call `then` with the tapped value at every forward pass; returns the handle that takes the hook away."""
    module, hook = model.get_submodule(tap.path), _Read(tap, then)
    if tap.side == "output":
        return module.register_forward_hook(hook.output)
    return module.register_forward_pre_hook(hook.input, with_kwargs=True)


def argument(tap: Tap, args: tuple, kwargs: dict) -> Any:
    """The input that a tap names: by keyword, by position, or the first of all when position 0 came as a keyword."""
    if isinstance(tap.key, str):
        return kwargs.get(tap.key)
    if tap.key < len(args):
        return args[tap.key]
    values = list(kwargs.values())
    if tap.key - len(args) < len(values):
        return values[tap.key - len(args)]
    raise AnatomyError(f"module '{tap.path}' was called with {len(args)} inputs, the tap asks for number {tap.key}")


def rewrite(model: nn.Module, tap: Tap, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Replace a tapped output by `change(output)` at every forward pass; returns the handle that undoes it."""
    if tap.side != "output":
        raise AnatomyError(f"only outputs can be rewritten, the tap at '{tap.path}' is an input")
    module = model.get_submodule(tap.path)
    handle = module.register_forward_hook(_Rewrite(tap, change))
    hooks: Any = module._forward_hooks
    for key, hook in list(hooks.items()):
        # transformers notes hidden states with hooks, set when they are first asked for, and models may go on with what
        # was noted (LLaVA): it has to be what is rewritten, whether the model has run before or not.
        if getattr(hook, "__name__", "") == "output_capturing_hook":
            hooks.move_to_end(key)
    return handle
