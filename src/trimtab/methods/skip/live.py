"""What a model holds of its configuration: objects in its modules, which are put right when it becomes shorter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from trimtab.methods.skip.proof import Cut, Difference, Promise


def configs_of(model: nn.Module, path: str) -> Iterator[Any]:
    """Configurations that may stand for a list of blocks: of the modules around it and of the whole model."""
    seen: set[int] = set()
    parts = path.split(".")
    for end in range(len(parts), -1, -1):
        try:
            config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        except AttributeError:
            continue
        if config is not None and hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            yield config


def own_configs(model: nn.Module) -> None:
    """Give a model copies of all configuration objects that it holds, which another model may share.

    What was one object within the model is one object again: a part goes on with its share of the whole's.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if hasattr(value, "to_dict") and not isinstance(value, (nn.Module, type)):
                vars(module)[key] = copy.deepcopy(value, memo)


def take_over_configs(model: nn.Module, fresh: nn.Module, promise: Promise) -> None:
    """Change the configurations of a model and of its parts, which may be copies (T5's stacks), as those of its class
    have changed: what was set by hand besides stays."""
    built = dict(fresh.named_modules())
    for path, module in model.named_modules():
        before = promise.configs.get(promise.was.get(id(module), path))
        after = getattr(built.get(path), "config", None)
        own = getattr(module, "config", None)
        if before is not None and after is not None and own is not None:
            _take_over(own, before, after)


def _take_over(own: Any, before: Any, after: Any) -> None:
    for key, value in vars(after).items():
        if hasattr(value, "to_dict"):
            mine, was = vars(own).get(key), vars(before).get(key)
            if hasattr(mine, "to_dict") and hasattr(was, "to_dict"):
                _take_over(mine, was, value)
        elif vars(before).get(key) != value:
            vars(own)[key] = copy.deepcopy(value)  # past the checks of single settings, which belong together


def cut_tensor(module: nn.Module, d: Difference, cuts: Sequence[Cut]) -> None:
    """Keep the kept blocks' parts of a tensor that has one for each block along an axis, one block after the other."""
    axis = next(i for i, (a, b) in enumerate(zip(d.own, d.built, strict=True)) if a != b)
    cut = next(c for c in cuts if d.own[axis] * len(c.kept) == d.built[axis] * c.count)
    old = getattr(module, d.key)
    parts = old.detach().unflatten(axis, (cut.count, -1))
    left = parts.index_select(axis, torch.tensor(cut.kept, device=old.device)).flatten(axis, axis + 1)
    if isinstance(old, nn.Parameter):
        setattr(module, d.key, nn.Parameter(left, requires_grad=old.requires_grad))
    else:
        module._buffers[d.key] = left
