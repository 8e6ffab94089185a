"""The configuration of a model that becomes shorter: numbers of layers, lists with one entry a layer, and proof.

A model is shortened only if its class, built from the new configuration, is the shortened model: the same shapes, and
the same plain settings in every module. What a configuration says for each layer in a way that is not known here
(Gemma 3n's embeddings for each layer, say) shows in that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

# Settings that name blocks by number, and what they say of a block: that it is of another `kind`, or that what it puts
# out is `read`. One that is skipped puts out what the block before it does.
_NUMBERED = {"fullatt_block_indexes": "kind", "deepstack_visual_indexes": "read"}


def renumbered(model: nn.Module, path: str, kept: list[int]) -> list[tuple[Any, str, list[int]]]:
    """Settings that name blocks of a list by number, with the numbers that they have when the others are gone.

    Raises:
        ValueError: if it is not known what a setting means, or two numbers would become one.
    """
    found = []
    blocks: Any = model.get_submodule(path)
    for config in configs_of(model, path):
        for key, value in _values(config):
            if not (isinstance(value, list) and value and key.endswith(("_layers", "_indexes", "_indices"))):
                continue
            meaning = _NUMBERED.get(key)
            if meaning is None and len(value) != len(blocks) and all(type(v) is int for v in value):
                raise ValueError(f"shorten: {type(config).__name__}.{key} names layers by number; not supported")
            if meaning == "kind":
                found.append((config, key, [new for new, old in enumerate(kept) if old in value]))
            if meaning == "read":
                new = [sum(k <= i for k in kept) - 1 for i in value]
                if min(new) < 0 or len(set(new)) < len(new):
                    raise ValueError(
                        f"shorten: {type(config).__name__}.{key} reads the blocks {value} of '{path}': what is left "
                        f"({kept}) has no block of its own for each"
                    )
                found.append((config, key, new))
    return found


def shorten_config(model: nn.Module, path: str, count: int, kept: list[int]) -> None:
    """Set the number of layers, and cut the lists with one entry a layer.

    Which setting it is differs from class to class. The one is right with which the class, built from its
    configuration, has exactly the parameters in this list that the shortened model has.
    """
    configs = list(configs_of(model, path))
    if _shorten_stage(model, configs, path, count, len(kept)):
        return
    numbers = [(c, k) for c in configs for k, v in _values(c) if v == count and type(v) is int and _counts_layers(k)]
    lists = [(c, k, v) for c in configs for k, v in _values(c) if isinstance(v, list) and len(v) == count]
    for config, key, value in lists:
        if "layer" in key and key not in _NUMBERED:
            setattr(config, key, [value[i] for i in kept])
    for choice in sorted(product((True, False), repeat=len(numbers)), key=lambda c: (abs(sum(c) - 1), c)):
        for (config, key), take in zip(numbers, choice, strict=True):
            setattr(config, key, len(kept) if take else count)
        if any(choice) and (fresh := _fits(model, path)) is not None:
            _copy_counts(fresh, model)
            return
    for config, key in numbers:
        setattr(config, key, count)
    tried = ", ".join(f"{type(c).__name__}.{k}" for c, k in numbers) or "none"
    raise ValueError(
        f"shorten: no setting of {type(model).__name__}'s configuration gives '{path}' {len(kept)} blocks "
        f"(tried {tried}), or its class cannot be built from it; save its weights beside its class instead"
    )


def _shorten_stage(model: nn.Module, configs: list[Any], path: str, count: int, left: int) -> bool:
    """Set the number of layers in a list of lists, one a stage (DaViT), where `depths` has a number for each stage."""
    _, _, stage = path.rpartition(".")
    for config in configs:
        depths = getattr(config, "depths", None)
        if not stage.isdigit() or not isinstance(depths, (list, tuple)) or list(depths[int(stage) :][:1]) != [count]:
            continue
        config.depths = [left if i == int(stage) else n for i, n in enumerate(depths)]
        if _fits(model, path) is not None:
            return True
        config.depths = depths
    return False


def _counts_layers(key: str) -> bool:
    return "layer" in key or "depth" in key


def _values(config: Any) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in vars(config).items() if not k.startswith("_")]


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


def _fits(model: Any, path: str) -> nn.Module | None:
    """The class built from the configuration, without data, if its list at `path` has the parameters that ours has."""
    if (fresh := _built(model)) is None:
        return None
    own, built = ({n: p.shape for n, p in m.named_parameters() if n.startswith(f"{path}.")} for m in (model, fresh))
    return fresh if own == built else None


def _copy_counts(fresh: nn.Module, model: nn.Module) -> None:
    """Put the numbers of layers right in the configurations of parts too, which may be copies (T5's stacks)."""
    modules = dict(model.named_modules())
    for name, module in fresh.named_modules():
        own = getattr(modules.get(name), "config", None)  # None too where another list still holds a skipped block
        if own is None or getattr(module, "config", None) is None:
            continue
        for key, value in _values(module.config):
            if _counts_layers(key) and type(value) is int and getattr(own, key, None) != value:
                setattr(own, key, value)


# --- configurations of a model's own, and the proof -------------------------------------------------------------------


def own_configs(model: nn.Module) -> None:
    """Give a model copies of all configuration objects that it holds, which another model may share.

    What was one object within the model is one object again: a part goes on with its share of the whole's.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if hasattr(value, "to_dict") and not isinstance(value, (nn.Module, type)):
                vars(module)[key] = copy.deepcopy(value, memo)


class Proof:
    """What a model's configuration says of it now, to be asked again when it has become shorter.

    Only what the configuration decides now is compared: what was set by hand, or was added, is nobody's promise.

    Args:
        model: before anything is changed.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        fresh = _built(model)
        known = {} if fresh is None else {path: _facts(m) for path, m in fresh.named_modules()}
        self.held: dict[int, set[str]] = {}
        for path, module in model.named_modules():
            promised = known.get(path, {})
            self.held[id(module)] = {k for k, v in _facts(module).items() if k in promised and promised[k] == v}

    def check(self) -> None:
        """Raise a ValueError unless the class, built from the configuration, is the model as it is now."""
        if (fresh := _built(self.model)) is None:
            raise ValueError(f"shorten: no {type(self.model).__name__} can be built from the shortened configuration")
        built = dict(fresh.named_modules())
        for path, module in self.model.named_modules():
            facts = _facts(module)
            promised = _facts(built[path]) if path in built else {}
            for key in sorted(self.held.get(id(module), ())):
                if key not in promised or promised[key] != facts[key]:
                    raise ValueError(
                        f"shorten: a {type(self.model).__name__} built from the shortened configuration would not be "
                        f"this model: '{path}'.{key} is {facts[key]}, and there {promised.get(key, 'missing')}. Its "
                        "configuration has something for each layer that is not understood here; nothing was changed"
                    )


def _facts(module: nn.Module) -> dict[str, Any]:
    """Shapes of a module's own tensors, and its plain settings, without rates of dropout (of layers of the first)."""
    tensors = {**module._parameters, **module._buffers}
    found: dict[str, Any] = {n: tuple(t.shape) for n, t in tensors.items() if t is not None}
    for key, value in vars(module).items():
        if not key.startswith("_") and key != "training" and "drop" not in key and _plain(value):
            found[key] = value
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return isinstance(value, (bool, int, float, str))


def _built(model: Any) -> nn.Module | None:
    """The class built from the model's configuration, without data; None if that is not possible."""
    try:
        with torch.device("meta"):
            return type(model)(model.config)
    except (ValueError, IndexError, TypeError, AttributeError):
        return None
