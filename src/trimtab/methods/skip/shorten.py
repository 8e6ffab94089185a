"""Models that are really shorter: no gap in key-value caches, and an ordinary model with fewer layers.

What a list of layers fixes elsewhere is put right:

    layer_idx           of attention modules: a key-value cache has one slot a layer; slot 0 tells its length
    configuration       number of layers, lists with one entry a layer (`layer_types`), lists that name some by number
    relative positions  T5's first layer holds the position bias of all: it is handed to the first layer that is kept
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from trimtab.anatomy import Anatomy, AnatomyError
from trimtab.anatomy.structure import HANDLE, added_by, is_wrapped
from trimtab.methods.skip.adapters import Skipped
from trimtab.methods.skip.configs import Proof, configs_of, own_configs, renumbered, shorten_config

_HELD = ("_modules", "_parameters", "_buffers")  # of a module: dicts of their own, which are changed in place


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
            _set_slot(model.get_submodule(path), slot)


def _set_slot(block: Any, slot: int) -> None:
    """The place of a block's attention in key-value caches."""
    for module in block.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = slot


def _kinds(model: nn.Module, paths: list[str]) -> list[str]:
    """Kind of attention of each block (`full_attention`, `sliding_attention`), one for all if the model has but one."""
    for config in configs_of(model, paths[0]):
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
            heir: Any = model.get_submodule(f"{other}.{name}")
            if not heir.has_relative_attention_bias:
                heir.relative_attention_bias = module.relative_attention_bias
                heir.has_relative_attention_bias = True
            return


def shorten(model: nn.Module, skip: Collection[str] = ()) -> nn.Module:
    """Take blocks out of a model for good: their modules, weights, and their share of its configuration.

    The result is an ordinary model of its class, which `save_pretrained` writes and `from_pretrained` reads. Its
    configuration is its own afterwards: a model that shared it keeps what it had.

    Args:
        model: a model whose blocks stand in `nn.ModuleList`s; changed in place. Blocks that were skipped without
            adapters (`adapters: none`) are taken out too.
        skip: dotted paths of blocks to take out.

    Returns:
        The model.

    Raises:
        ValueError: if methods are attached to the model in a handle, if adapters are left in it, which no ordinary
            class has a place for, if a path is no block in a list or one that cannot go (`Block.stays`), or if no
            configuration of its class stands for the shorter model. The model is as it was then.
    """
    if any(HANDLE in vars(m) for m in model.modules()):
        raise ValueError(
            "shorten: methods are attached to this model, whose masks or side networks need its blocks: use "
            "`fit.skip(...)` of the handle that `trimtab.adapt` gave, with `plan=` these blocks and `adapters='none'`"
        )
    return take_out(model, skip)


def take_out(model: nn.Module, skip: Collection[str] = ()) -> nn.Module:
    """`shorten`, for whoever knows what is attached to the model."""
    _check_ordinary(model)
    for path, why in _staying(model, skip):
        raise ValueError(f"shorten: '{path}' cannot be taken out: {why}; skip it with adapters, and keep the run")
    lists = _lists(model, {*skip, *(n for n, m in model.named_modules() if isinstance(m, Skipped))})
    if not lists:
        return model
    was = [(m, {k: v.copy() if k in _HELD else v for k, v in vars(m).items()}) for m in model.modules()]
    try:
        proof = None
        if getattr(model, "config", None) is not None:
            proof = Proof(model)
            own_configs(model)
        for path, indices in lists.items():
            _shorten_list(model, path, set(indices))
        if proof is not None:
            proof.check()
    except BaseException:
        for module, contents in was:
            vars(module).clear()
            vars(module).update(contents)
        raise
    return model


def _check_ordinary(model: nn.Module) -> None:
    """Raise a ValueError if methods have added modules to the model, or wrapped its layers."""
    left = [n for n, m in model.named_modules() if added_by(m) is not None and not isinstance(m, Skipped)]
    if left:
        raise ValueError(
            f"{len(left)} adapters are part of the model ('{left[0]}', ...), and no {type(model).__name__} of fewer "
            "layers has a place for them: skip with `adapters: none`, or keep the model as a run of trimtab; "
            "torch.export and ONNX take it as it is"
        )
    wrapped = [n for n, m in model.named_modules() if is_wrapped(m)]
    if wrapped:
        raise ValueError(
            f"shorten: {len(wrapped)} layers are wrapped ('{wrapped[0]}', ...): merge what wraps them first "
            "(`merge_and_unload` of PEFT)"
        )


def _lists(model: nn.Module, gone: Collection[str]) -> dict[str, list[int]]:
    """Path of each list -> numbers of the blocks that go; ValueError if a path is no block in a list."""
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
    return lists


def _staying(model: nn.Module, skip: Collection[str]) -> Iterator[tuple[str, str]]:
    """Blocks that would go, but cannot, and why."""
    skipped = {n: m.block.stays for n, m in model.named_modules() if isinstance(m, Skipped)}
    try:
        # A skipped block may lack what a description reads; then the others' were read before it was.
        described = {b.path: b.stays for b in Anatomy.of(model).blocks()} if skip and not skipped else {}
    except AnatomyError:
        described = {}
    yield from ((p, why) for p, why in (skipped | {p: described.get(p, "") for p in skip}).items() if why)


def _shorten_list(model: nn.Module, path: str, gone: set[int]) -> None:
    """Take blocks out of one list, number the others again and put the configuration right."""
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    count = len(blocks)
    kept = [i for i in range(count) if i not in gone]
    if not kept:
        raise ValueError(f"shorten: all {count} blocks of '{path}' would be gone; keep one")
    numbered = renumbered(model, path, kept) if getattr(model, "config", None) is not None else []
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
        _set_slot(block, new)
    if getattr(model, "config", None) is not None:
        shorten_config(model, path, count, kept)
