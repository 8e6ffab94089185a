"""What a module is called with, by the names that its `forward` gives its parameters."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_LIKE = "_trimtab_called_like"


def called_like(module: nn.Module, original: nn.Module) -> None:
    """Note that a module stands in another's place and is called as that one was."""
    setattr(module, _LIKE, parameter_names(original))


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of what a module's forward takes by position, in order."""
    if (like := getattr(module, _LIKE, None)) is not None:
        return like
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(n for n, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds)


def arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Name -> value of everything that a module is called with, however it was passed."""
    return {**dict(zip(parameter_names(module), args, strict=False)), **kwargs}
