"""What a module is called with, by the names that its `forward` gives its parameters."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of what a module's forward takes by position, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(n for n, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds)


def stream_name(stream: str, module: nn.Module, args: tuple, kwargs: dict) -> str | int:
    """Keyword or position under which a block was given its stream."""
    names = parameter_names(module)
    name = stream if stream in names or stream in kwargs or not names else names[0]
    if name in kwargs:
        return name
    return names.index(name) if name in names else 0


def replaced(args: tuple, kwargs: dict, at: str | int, new: Any) -> tuple[tuple, dict]:
    """The arguments of a call with another value for one of them."""
    if isinstance(at, str):
        return args, {**kwargs, at: new}
    return (*args[:at], new, *args[at + 1 :]), kwargs
