"""Models that are really shorter: no gap in key-value caches, and an ordinary model with fewer layers.

What a list of layers fixes elsewhere is put right:

    layer_idx           of attention modules: a key-value cache has one slot a layer; slot 0 tells its length
    configuration       number of layers, lists with one entry a layer (`layer_types`), lists that name some by number
    relative positions  T5's first layer holds the position bias of all: it is handed to the first layer that is kept
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

from trimtab.anatomy import Anatomy, AnatomyError
from trimtab.methods.skip.adapters import Adapter, RoutedAdapter, Skipped

# Settings that name blocks by number, and what they say of a block: that it is of another `kind`, or that what it puts
# out is `read`. One that is skipped puts out what the block before it does.
_NUMBERED = {"fullatt_block_indexes": "kind", "deepstack_visual_indexes": "read"}


def close_gaps(model: nn.Module, anatomy: Anatomy, skipped: Collection[str]) -> None:
    """Number the kept blocks of each tower without gaps, so that generation with a key-value cache stays right.

    A cache has its slots by `layer_idx`, and the length of slot 0 (or of the first slot of a kind, where a model has
    layers of several kinds) is the number of tokens seen: with block 0 skipped it would stay empty for ever.

    Args:
        model: with its skipped blocks replaced already; changed in place.
        anatomy: before the skipped blocks are taken out of it.
        skipped: paths of the skipped blocks.
    """
    for tower in anatomy.towers:
        paths = [b.path for b in tower.blocks]
        if not paths or not set(paths) & set(skipped):
            continue
        kept = [p for p in paths if p not in skipped]
        kinds = _kinds(model, paths)
        free = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in kinds}
        for path in kept:
            slot = free[kinds[paths.index(path)]].pop(0)
            for module in model.get_submodule(path).modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = slot


def _kinds(model: nn.Module, paths: list[str]) -> list[str]:
    """Kind of attention of each block (`full_attention`, `sliding_attention`), one for all if the model has but one."""
    for config in _configs(model, paths[0]):
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and len(kinds) == len(paths):
            return [str(k) for k in kinds]
    return [""] * len(paths)


def hand_on_positions(model: nn.Module, path: str, kept: list[str]) -> None:
    """Give T5's relative position bias, if the block at `path` holds one, to the first kept block that has none."""
    for name, module in list(model.get_submodule(path).named_modules()):
        if not getattr(module, "has_relative_attention_bias", False):
            continue
        for other in kept:
            heir = model.get_submodule(f"{other}.{name}")
            if not heir.has_relative_attention_bias:
                heir.relative_attention_bias = module.relative_attention_bias
                heir.has_relative_attention_bias = True
            return


def shorten(model: nn.Module, skip: Collection[str] = ()) -> nn.Module:
    """Take blocks out of a model for good: their modules, weights, and their share of its configuration.

    The result is an ordinary model of its class, which `save_pretrained` writes and `from_pretrained` reads.

    Args:
        model: a model whose blocks stand in `nn.ModuleList`s; changed in place. Blocks that were skipped without
            adapters (`adapters: none`) are taken out too.
        skip: dotted paths of blocks to take out.

    Returns:
        The model.

    Raises:
        ValueError: if adapters are left in the model, which no ordinary class has a place for, if a path is no block
            in a list or one that cannot go (`Block.stays`), or if no setting of the model's configuration stands for
            the number of layers.
    """
    left = [n for n, m in model.named_modules() if isinstance(m, (Adapter, RoutedAdapter))]
    if left:
        raise ValueError(
            f"{len(left)} adapters are part of the model ('{left[0]}', ...), and no {type(model).__name__} of fewer "
            "layers has a place for them: skip with `adapters: none`, or keep the model as a run of trimtab; "
            "torch.export and ONNX take it as it is"
        )
    for path, why in _staying(model, skip):
        raise ValueError(f"shorten: '{path}' cannot be taken out: {why}; skip it with adapters, and keep the run")
    gone = {*skip, *(n for n, m in model.named_modules() if isinstance(m, Skipped))}
    lists: dict[str, list[int]] = {}
    for path in gone:
        parent, _, name = path.rpartition(".")
        try:
            holder = model.get_submodule(parent)
        except AttributeError:
            holder = None
        if not isinstance(holder, nn.ModuleList) or not name.isdigit() or int(name) >= len(holder):
            raise ValueError(f"shorten: '{path}' is no block in a list of {type(model).__name__}")
        lists.setdefault(parent, []).append(int(name))
    for path, indices in lists.items():
        _shorten_list(model, path, set(indices))
    return model


def _staying(model: nn.Module, skip: Collection[str]) -> Iterator[tuple[str, str]]:
    """Blocks that would go, but cannot, and why."""
    skipped = {n: m.stays for n, m in model.named_modules() if isinstance(m, Skipped)}
    try:
        # A skipped block may lack what a description reads; then the others' were read before it was.
        described = {b.path: b.stays for b in Anatomy.of(model).blocks()} if skip and not skipped else {}
    except AnatomyError:
        described = {}
    yield from ((p, why) for p, why in (skipped | {p: described.get(p, "") for p in skip}).items() if why)


def _renumbered(model: nn.Module, path: str, kept: list[int]) -> list[tuple[Any, str, list[int]]]:
    """Settings that name blocks of a list by number, with the numbers that they have when the others are gone.

    Raises:
        ValueError: if it is not known what a setting means, or two numbers would become one.
    """
    found = []
    for config in _configs(model, path):
        for key, value in _values(config):
            if not (isinstance(value, list) and value and key.endswith(("_layers", "_indexes", "_indices"))):
                continue
            meaning = _NUMBERED.get(key)
            if meaning is None and len(value) != len(model.get_submodule(path)) and all(type(v) is int for v in value):
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


def _shorten_list(model: nn.Module, path: str, gone: set[int]) -> None:
    """Take blocks out of one list, number the others again and put the configuration right."""
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    count = len(blocks)
    kept = [i for i in range(count) if i not in gone]
    if not kept:
        raise ValueError(f"shorten: all {count} blocks of '{path}' would be gone; keep one")
    numbered = _renumbered(model, path, kept) if getattr(model, "config", None) is not None else []
    for i in sorted(gone):
        if not isinstance(blocks[i], Skipped):
            hand_on_positions(model, f"{path}.{i}", [f"{path}.{k}" for k in kept])
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    setattr(holder, name, nn.ModuleList(blocks[i] for i in kept))
    for config, key, numbers in numbered:
        setattr(config, key, numbers)
        if hasattr(holder, key):  # the module has taken it over from its configuration
            setattr(holder, key, numbers)
    for new, block in enumerate(model.get_submodule(path).children()):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = new
    if getattr(model, "config", None) is not None:
        _shorten_config(model, path, count, kept)


def _shorten_config(model: nn.Module, path: str, count: int, kept: list[int]) -> None:
    """Set the number of layers, and cut the lists with one entry a layer.

    Which setting it is differs from class to class. The one is right with which the class, built from its
    configuration, has exactly the parameters in this list that the shortened model has.
    """
    configs = list(_configs(model, path))
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
        f"(tried {tried}); save its weights beside its class instead"
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


def _configs(model: nn.Module, path: str) -> Iterator[Any]:
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
    try:
        with torch.device("meta"):
            fresh = type(model)(model.config)
    except (ValueError, IndexError, TypeError, AttributeError):
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
