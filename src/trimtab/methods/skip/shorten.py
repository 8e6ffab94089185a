"""Models that are really shorter: no gap in key-value caches, and an ordinary model with fewer layers.

What a list of layers fixes elsewhere is put right:

    layer_idx           of attention modules: a key-value cache has one slot a layer; slot 0 tells its length
    configuration       number of layers, lists with one entry a layer (`layer_types`), lists that name some by number
    relative positions  T5's first layer holds the position bias of all: it is handed to the first layer that is kept
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from itertools import islice, product
from typing import Any

from torch import nn

from trimtab.anatomy import Anatomy, AnatomyError
from trimtab.anatomy.structure import HANDLE, added_by, is_wrapped, replace_module
from trimtab.methods.skip.configs import Choice, Setting, as_read, read, written
from trimtab.methods.skip.finding import Found, Search
from trimtab.methods.skip.live import configs_of, cut_tensor, own_configs, take_over_configs
from trimtab.methods.skip.proof import (
    Cut,
    Promise,
    build,
    has_values,
    loaded,
    numbers,
    set_numbers,
    tensors,
    within,
)
from trimtab.methods.skip.running import (
    NotRun,
    Passed,
    differs_from_loaded,
    differs_from_passed,
    own_example,
    pass_by,
)
from trimtab.methods.skip.skipped import Skipped

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


def shorten(model: nn.Module, skip: Collection[str] = (), example: Mapping[str, Any] | None = None) -> nn.Module:
    """Take blocks out of a model for good: their modules, weights, and their share of its configuration.

    The result is an ordinary model of its class, which `save_pretrained` writes and `from_pretrained` reads; that is
    proven before it is handed back, see `take_out`. Its configuration is its own afterwards: a model that shared it
    keeps what it had.

    Args:
        model: a model whose blocks stand in `nn.ModuleList`s; changed in place. Blocks that were skipped without
            adapters (`adapters: none`) are taken out too.
        skip: dotted paths of blocks to take out.
        example: keyword arguments of the model, a batch that runs through these blocks. Without it one is made up from
            the configuration where words or a picture suffice.

    Returns:
        The model.

    Raises:
        ValueError: if methods are attached to the model in a handle, if adapters are left in it, which no ordinary
            class has a place for, if a path is no block in a list or one that cannot go (`Block.stays`), if no
            configuration of its class stands for the shorter model, if it does not compute what the whole model does
            with these blocks passed by, or if only an example can tell. The model is as it was then.
    """
    if any(HANDLE in vars(m) for m in model.modules()):
        raise ValueError(
            "shorten: methods are attached to this model, whose masks or side networks need its blocks: use "
            "`fit.skip(...)` of the handle that `trimtab.adapt` gave, with `plan=` these blocks and `adapters='none'`"
        )
    return take_out(model, skip, example)


def take_out(model: nn.Module, skip: Collection[str] = (), example: Mapping[str, Any] | None = None) -> nn.Module:
    """`shorten`, for whoever knows what is attached to the model.

    What is proven, before it is believed:
        built     the class, built from the new configuration on the meta device, has the same modules, tensors and
                  plain settings
        loaded    the weights load into it, none missing and none left over
        run       with an example that runs through the blocks, the outputs are those of the whole model with these
                  blocks passed by, and so is what it generates with its cache; the loaded model gives them bit for bit
    """
    _check_ordinary(model)
    for path, why in _staying(model, skip):
        raise ValueError(f"shorten: '{path}' cannot be taken out: {why}; skip it with adapters, and keep the run")
    skipped = [n for n, m in model.named_modules() if isinstance(m, Skipped)]
    cuts = _cuts(model, {*skip, *skipped})
    if not cuts:
        return model
    was = _contents(model)
    try:
        Shortening(model, cuts, [p for p in skip if p not in skipped], skipped, example).go()
    except BaseException:
        _put_back(was)
        raise
    return model


def _contents(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    return [(m, {k: v.copy() if k in _HELD else v for k, v in vars(m).items()}) for m in model.modules()]


def _put_back(was: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, contents in was:
        vars(module).clear()
        vars(module).update({k: v.copy() if k in _HELD else v for k, v in contents.items()})


class Shortening:
    """One change of a model, and its proof; whoever calls `go` puts the model back if it raises.

    Args:
        model: the whole model.
        cuts: lists of blocks and what is kept of them.
        gone: paths of the blocks that go and still compute.
        empty: paths of what stands in place of blocks that are gone already.
        example: keyword arguments of the model; None to make some up.
    """

    def __init__(self, model: Any, cuts: list[Cut], gone: list[str], empty: list[str],
                 example: Mapping[str, Any] | None):  # fmt: skip
        self.model, self.cuts, self.gone, self.empty = model, cuts, gone, empty
        config = getattr(model, "config", None)
        self.config = config if hasattr(config, "to_dict") else None
        self.passed: Passed | None = None
        self.example = example
        if has_values(model):
            self._pass_by()

    def _pass_by(self) -> None:
        """What the whole model computes with the blocks passed by, if there is an example that runs through them."""
        if self.example is not None:
            self.passed = pass_by(self.model, self.gone, self.example, self.empty)
            return
        if self.config is None:
            return
        why = "no inputs could be made from its configuration"
        if (made := own_example(self.model)) is not None:
            try:
                self.passed, self.example = pass_by(self.model, self.gone, made, self.empty), made
                return
            except NotRun as error:
                why = str(error).removeprefix("shorten: ").partition(":")[0]
        warnings.warn(
            f"shorten: the {type(self.model).__name__} is compared with its configuration and not run without "
            f"{self._what()} ({why}): give `example=`, keyword arguments of the model with which they run",
            stacklevel=4,
        )

    def go(self) -> None:
        if self.config is None:
            for cut in self.cuts:
                own = numbers(self.model, cut)
                self._cut(cut)
                set_numbers(self.model, cut, own)
            self._check_passed()
            return
        promise = self._promise()
        own_configs(self.model)
        for cut in self.cuts:
            self._cut(cut)
            set_numbers(self.model, cut, promise.numbers[cut.path])
        search = Search(self.model, self.config, promise, self.cuts)
        found = search.found()
        if found.open and self.passed is None:
            self._ask(found.open)
        was, tried = _contents(self.model), ""
        for values in islice(product(*(_first(c, found, search) for c in found.open)), 16):
            changes = found.changes | dict(zip((c.setting for c in found.open), values, strict=True))
            own_configs(self.model)  # what does not hold is put back, with the objects as they were
            self._settle(search, promise, changes)
            if self.passed is None or not (why := differs_from_passed(self.model, self.example or {}, self.passed,
                                                                      self.cuts)):  # fmt: skip
                break
            tried = tried or why
            _put_back(was)
        else:
            raise ValueError(
                f"shorten: the shortened {type(self.model).__name__} does not compute what the model does with "
                f"{self._what()} passed by: {tried}; nothing was changed. Skip with adapters, and keep the run"
            )
        self._check_loaded()

    def _what(self) -> str:
        return ", ".join(map(repr, [*self.gone, *self.empty]))

    def _promise(self) -> Promise:
        """What the configuration decides now.

        Raises:
            ValueError: if the class cannot be built from it, or is another than the model before anything is changed.
        """
        name = type(self.model).__name__
        try:
            config = read(self.config, written(self.config))
        except Exception as error:  # whatever a configuration's own checks raise
            raise ValueError(
                f"shorten: the configuration of this {name} cannot be read as it is written ({type(error).__name__}: "
                f"{error}): nothing could be proven"
            ) from error
        base, why = build(self.model, config)
        if base is None:
            raise ValueError(f"shorten: no {name} can be built from its configuration ({why}): nothing could be proven")
        promise = Promise(self.model, base, self.cuts)
        for d in promise.differences(self.model, base, ()):
            if not within(d.path, self.cuts):
                raise ValueError(
                    f"shorten: this model is not what its configuration says before anything is changed: {d}; correct "
                    f"the configuration of the {name} first, or take its blocks out by hand"
                )
        return promise

    def _cut(self, cut: Cut) -> None:
        """Take blocks out of one list."""
        blocks: Any = self.model.get_submodule(cut.path)
        kept = [f"{cut.path}.{k}" for k in cut.kept]
        for i in sorted({*range(cut.count)} - {*cut.kept}):
            if not isinstance(blocks[i], Skipped):
                hand_on_positions(self.model, f"{cut.path}.{i}", kept)
        replace_module(self.model, cut.path, nn.ModuleList(blocks[i] for i in cut.kept))

    def _ask(self, choices: list[Choice]) -> None:
        setting = choices[0].setting
        raise ValueError(
            f"shorten: '{setting}' of {type(self.config).__name__} may speak of the blocks by number or have something "
            f"for each of them, and nothing shows what: give `example=`, keyword arguments of the model with which "
            f"{self._what()} run; nothing was changed"
        )

    def _settle(self, search: Search, promise: Promise, changes: dict[Setting, Any]) -> None:
        """Put the changes into the model's own configuration objects, and into what its modules have taken from them.

        Raises:
            ValueError: if a tensor has a part for each block and no example shows in which order.
        """
        fresh = search.built(changes)
        assert fresh is not None
        take_over_configs(self.model, fresh, promise)
        for d in list(promise.differences(self.model, fresh, self.cuts)):
            module = self.model.get_submodule(d.path)
            if d.key not in tensors(module):
                setattr(module, d.key, d.built)
                continue
            if self.passed is None:
                raise ValueError(
                    f"shorten: '{d.path}'.{d.key} is {d.own} and would be {d.built}: it seems to have a part for each "
                    "block; give `example=`, keyword arguments of the model, by which that can be proven; nothing was "
                    "changed"
                )
            cut_tensor(module, d, self.cuts)
        for d in promise.differences(self.model, fresh, self.cuts):
            raise ValueError(f"shorten: {d}: not understood; nothing was changed")

    def _check_passed(self) -> None:
        if self.passed is None:
            return
        if why := differs_from_passed(self.model, self.example or {}, self.passed, self.cuts):
            raise ValueError(
                f"shorten: the shortened model does not compute what the model does with {self._what()} passed by: "
                f"{why}; nothing was changed"
            )

    def _check_loaded(self) -> None:
        """Load the model again from what would be written, and compare what it computes."""
        if not has_values(self.model):
            return
        final = read(self.model.config, as_read(self.model.config, self.model.config.to_json_string()))
        again = loaded(self.model, final)
        if self.passed is not None and (why := differs_from_loaded(self.model, again, self.example or {})):
            raise ValueError(
                f"shorten: the {type(self.model).__name__} does not compute the same when it is loaded again: {why}; "
                "nothing was changed"
            )


def _first(choice: Choice, found: Found, search: Search) -> list[Any]:
    """The values of a choice, the one that was found first."""
    now = found.changes.get(choice.setting, choice.setting.of(search.values))
    return [now, *(v for v in choice.values if v != now)]


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


def _cuts(model: nn.Module, gone: Collection[str]) -> list[Cut]:
    """Each list and what is kept of it; ValueError if a path is no block in a list, or nothing of a list is kept."""
    lists: dict[str, set[int]] = {}
    for path in gone:
        parent, _, name = path.rpartition(".")
        try:
            holder = model.get_submodule(parent)
        except AttributeError:
            holder = None
        if not isinstance(holder, nn.ModuleList) or not name.isdigit() or int(name) >= len(holder):
            raise ValueError(f"shorten: '{path}' is no block in a list of {type(model).__name__}")
        lists.setdefault(parent, set()).add(int(name))
    cuts = []
    for path, out in lists.items():
        count = len(model.get_submodule(path))  # type: ignore[arg-type]
        if len(out) == count:
            raise ValueError(f"shorten: all {count} blocks of '{path}' would be gone; keep one")
        cuts.append(Cut(path, count, tuple(i for i in range(count) if i not in out)))
    return cuts


def _staying(model: nn.Module, skip: Collection[str]) -> Iterator[tuple[str, str]]:
    """Blocks that would go, but cannot, and why."""
    skipped = {n: m.block.stays for n, m in model.named_modules() if isinstance(m, Skipped)}
    try:
        # A skipped block may lack what a description reads; then the others' were read before it was.
        described = {b.path: b.stays for b in Anatomy.of(model).blocks()} if skip and not skipped else {}
    except AnatomyError:
        described = {}
    yield from ((p, why) for p, why in (skipped | {p: described.get(p, "") for p in skip}).items() if why)
