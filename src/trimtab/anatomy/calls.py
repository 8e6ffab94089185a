"""What a module is called with, by the names that its `forward` gives its parameters.

A model may pass an argument by position or by keyword, in any order: only the signature of `forward` tells which is
which. All that reads or changes the arguments of a call goes through here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from trimtab.anatomy.structure import AnatomyError, plain_module

_LIKE = "_trimtab_called_like"


class Signature(NamedTuple):
    """What a `forward` takes.

    Attributes:
        positional: names of what can be passed by position, in order.
        defaults: name -> default, of every parameter that has one.
        named: names of all parameters that can be passed by keyword.
        open: whether it takes any further keyword.
    """

    positional: tuple[str, ...]
    defaults: dict[str, Any]
    named: frozenset[str]
    open: bool


_KNOWN: WeakKeyDictionary[Callable, Signature] = WeakKeyDictionary()


def signature(module: nn.Module) -> Signature:
    """The signature of a module's forward, or of the module that it wraps or is called like."""
    module = plain_module(module, "")
    if (like := getattr(module, _LIKE, None)) is not None:
        return like
    forward = module.forward
    function = getattr(forward, "__func__", None)
    if function is None:  # set on the module itself, as Accelerate does: not kept, it would keep the module alive
        return _signature(forward, bound=True)
    if function not in _KNOWN:
        _KNOWN[function] = _signature(function, bound=False)
    return _KNOWN[function]


def _signature(forward: Callable, bound: bool) -> Signature:
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):  # compiled code without a signature
        return Signature((), {}, frozenset(), True)
    if not bound and parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        parameters = parameters[1:]  # self
    kinds = inspect.Parameter
    return Signature(
        tuple(p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)),
        {p.name: p.default for p in parameters if p.default is not kinds.empty},
        frozenset(p.name for p in parameters if p.kind in (kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD)),
        any(p.kind is kinds.VAR_KEYWORD for p in parameters),
    )


def called_like(module: nn.Module, original: nn.Module) -> None:
    """Note that a module stands in another's place and is called as that one was.

    Its own forward may then take `*args, **kwargs`, and `arguments` still knows their names.
    """
    setattr(module, _LIKE, signature(original))


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of what a module's forward takes by position, in order."""
    return signature(module).positional


def arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Name -> value of everything that a module is called with, however it was passed.

    What was not passed is not in it; nor is what goes into a `*args`, which has no name.
    """
    return {**dict(zip(parameter_names(module), args, strict=False)), **kwargs}


def replaced(module: nn.Module, args: tuple, kwargs: dict, name: str, new: Any) -> tuple[tuple, dict]:
    """The arguments of a call with another value for one of them, passed in the same way as before."""
    names = parameter_names(module)
    if name not in kwargs and name in names[: len(args)]:
        i = names.index(name)
        return (*args[:i], new, *args[i + 1 :]), kwargs
    return args, {**kwargs, name: new}


def passed(args: tuple, kwargs: dict) -> str:
    """What a module was called with, for error messages: kinds of the positional arguments, names of the others."""
    found = [_kind(a) for a in args] + [f"{name}={_kind(value)}" for name, value in kwargs.items()]
    return f"({', '.join(found)})"


def _kind(value: Any) -> str:
    return f"Tensor{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def stream_name(path: str, stream: str, module: nn.Module, args: tuple, kwargs: dict) -> str | None:
    """Under which name a block was given its stream; None if it is the first of a `*args`.

    The parameter `stream` if the forward has one, else the first that it takes by position.

    Raises:
        AnatomyError: if that was not passed.
    """
    known = signature(module)
    name = stream if stream in known.positional or stream in known.named else next(iter(known.positional), stream)
    if name in arguments(module, args, kwargs):
        return name
    if args and not known.positional:
        return None
    raise AnatomyError(
        f"block '{path}' ({type(module).__name__}) was called without its stream: expected {name!r}, found "
        f"{passed(args, kwargs)}; name the argument that carries it in `Block.stream`"
    )
