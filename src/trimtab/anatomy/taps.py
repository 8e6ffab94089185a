"""Taps: reading and rewriting values inside a forward pass from outside, with forward hooks.

A model with hooks can be copied (`copy.deepcopy`) and pickled: what a hook calls is copied with the model if it is a
module, a bound method, a `functools.partial` of these or an object with `__call__`. A lambda or a function with
variables of its own is not copied, nor is a method of a built-in type (`list.append`): the copy's hook would go on with
the original's. They serve for hooks that are taken away again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from trimtab.anatomy.calls import arguments, passed, signature
from trimtab.anatomy.parts import Block, Tap, Tower
from trimtab.anatomy.structure import AnatomyError, module_at, plain_module


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


def argument(module: nn.Module, tap: Tap, args: tuple, kwargs: dict) -> Any:
    """The input of a call that a tap names by keyword or by position, however it was passed.

    An input that was not passed is its default, None where the forward takes any keyword.

    Raises:
        AnatomyError: if it was not passed and the forward cannot do without, or has no such parameter.
    """
    known = signature(module)
    if isinstance(tap.key, int) and tap.key < len(args):
        return args[tap.key]
    name = tap.key
    if isinstance(name, int):
        name = known.positional[name] if name < len(known.positional) else ""
    given = arguments(module, args, kwargs)
    if name in given:
        return given[name]
    if name in known.defaults:
        return known.defaults[name]
    if isinstance(tap.key, str) and known.open and name not in known.positional:
        return None
    raise AnatomyError(
        f"module '{tap.path}' ({type(module).__name__}): the tap asks for input {tap.key!r}, found "
        f"{passed(args, kwargs)} of ({', '.join(known.positional)}); correct the tap's `key`"
    )


# --- hooks ------------------------------------------------------------------------------------------------------------


class _Hook:
    """What a module calls; `path` is its own."""

    def __init__(self, path: str, then: Callable[..., Any]):
        self.path, self.then = path, then

    def check(self, module: nn.Module) -> None:
        if getattr(module, "_is_replica", False):
            raise AnatomyError(
                f"module '{self.path}' runs in a replica of nn.DataParallel, which shares its hooks and what they hold "
                "with the other replicas: use DistributedDataParallel, one process a GPU (torchrun), or one GPU"
            )


class _Before(_Hook):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        self.check(module)
        return self.then(module, args, kwargs)


class _ReadInput(_Hook):
    def __init__(self, tap: Tap, then: Callable[[Any], Any]):
        super().__init__(tap.path, then)
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.check(module)
        self.then(_flat(self.tap, argument(module, self.tap, args, kwargs)))


class _ReadStream(_Hook):
    def __init__(self, block: Block, then: Callable[[Any], Any]):
        super().__init__(block.path, then)
        self.block = block

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.check(module)
        self.then(self.block.stream_of(module, args, kwargs))


class _ReadOutput(_Hook):
    def __init__(self, tap: Tap, then: Callable[[Any], Any]):
        super().__init__(tap.path, then)
        self.tap = tap

    def __call__(self, module: nn.Module, args: tuple, out: Any) -> None:
        self.check(module)
        self.then(_flat(self.tap, pick(out, self.tap.key)))


class _Rewrite(_Hook):
    def __init__(self, tap: Tap, change: Callable[[Any], Any]):
        super().__init__(tap.path, change)
        self.key = tap.key

    def __call__(self, module: nn.Module, args: tuple, out: Any) -> Any:
        self.check(module)
        return put(out, self.key, self.then(pick(out, self.key)))


def _flat(tap: Tap, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if tap.pairs:
        return _of_tokens(tap, value)
    value = value.flatten(1) if tap.flat else value
    return value == 0 if tap.padding else value


def _of_tokens(tap: Tap, pairs: Tensor) -> Tensor:
    """Which tokens are seen by a mask of pairs, (B, L).

    Raises:
        AnatomyError: if some tokens see what others do not: then it is no mask of tokens.
    """
    same = pairs.ndim == 4 and pairs.shape[1] == 1 and bool((pairs == pairs[:, :, :1]).all())
    if not same:
        raise AnatomyError(
            f"module '{tap.path}': expected at {tap.key!r} a mask of pairs (B, 1, L, L) that is the same for every "
            f"token that looks, found {tuple(pairs.shape)}, by which tokens see different ones: correct the tower's "
            "`mask`"
        )
    row = pairs[:, 0, 0]
    return row if row.dtype is torch.bool else row == 0


def pre_hook(model: nn.Module, path: str, then: Callable[[nn.Module, tuple, dict], Any]) -> RemovableHandle:
    """Call `then(module, args, kwargs)` before the module at a plain path runs.

    It returns None, or the pair (args, kwargs) with which the module is to run. For copies of the model see the
    module's text.
    """
    return module_at(model, path).register_forward_pre_hook(_Before(path, then), with_kwargs=True)


def read(model: nn.Module, tap: Tap, then: Callable[[Tensor], Any]) -> RemovableHandle:
    """Call `then` with the tapped value at every forward pass; returns the handle that takes the hook away.

    For copies of the model see the module's text.
    """
    module = _called(model, tap.path)
    if tap.side == "output":
        return module.register_forward_hook(_ReadOutput(tap, then))
    return module.register_forward_pre_hook(_ReadInput(tap, then), with_kwargs=True)


def _called(model: nn.Module, path: str) -> nn.Module:
    """The module at a plain path; AnatomyError if it is one that a forward pass goes around."""
    owner, _, name = path.rpartition(".")
    attention = plain_module(model, owner)
    if name == "out_proj" and isinstance(attention, nn.MultiheadAttention):
        raise AnatomyError(
            f"the tap at '{path}' sees nothing: nn.MultiheadAttention reads that layer's weight and never calls it; "
            f"name the attention's own output, Tap('{owner}', key=0), which is the projection's"
        )
    return module_at(model, path)


def read_stream(model: nn.Module, block: Block, then: Callable[[Tensor], Any]) -> RemovableHandle:
    """Call `then` with the stream that enters a block at every forward pass (`Block.stream_of`)."""
    return module_at(model, block.path).register_forward_pre_hook(_ReadStream(block, then), with_kwargs=True)


@contextmanager
def entering(model: nn.Module, towers: Iterable[Tower]) -> Iterator[dict[str, int]]:
    """How many samples were given to each of some towers in the pass before, by its name; without those that do not
    tell."""
    found: dict[str, int] = {}
    with ExitStack() as stack:
        for tower in towers:
            if tower.samples is not None:
                handle = read(model, tower.samples, partial(_note_samples, found, tower.name, 1))
            elif tower.blocks and tower.blocks[0].knows("blocks"):
                handle = read_stream(model, tower.blocks[0], partial(_note_samples, found, tower.name, 3))
            else:
                continue
            stack.callback(handle.remove)
        yield found


def _note_samples(found: dict[str, int], name: str, axes: int, value: Any) -> None:
    """Note how many rows a value has; of a stream of two axes it cannot be told whether these are samples or tokens."""
    if isinstance(value, Tensor) and value.ndim >= axes:
        found[name] = len(value)


def rewrite(model: nn.Module, tap: Tap, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Replace a tapped output by `change(output)` at every forward pass; returns the handle that undoes it.

    For copies of the model see the module's text.
    """
    if tap.side != "output":
        raise AnatomyError(f"only outputs can be rewritten, the tap at '{tap.path}' is an input")
    module = _called(model, tap.path)
    handle = module.register_forward_hook(_Rewrite(tap, change))
    hooks: Any = module._forward_hooks
    for key, hook in list(hooks.items()):
        # transformers notes hidden states with hooks, set when they are first asked for, and models may go on with what
        # was noted (LLaVA): it has to be what is rewritten, whether the model has run before or not.
        if getattr(hook, "__name__", "") == "output_capturing_hook":
            hooks.move_to_end(key)
    return handle
