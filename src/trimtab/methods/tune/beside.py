"""What methods share that train a network beside a frozen tower (UniPT, LST, SHERL, Side-Tuning).

A method says with `stand` which side network a tower gets, what it reads and where its result goes, or why the tower
can have none; the rest is here and in `listener`. A side network is a module with `forward(seen)`, whose `down` takes
the maps to its own width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

from trimtab.anatomy import Anatomy, Block, Tap, Tower
from trimtab.anatomy.calls import signature
from trimtab.anatomy.structure import mark_added, plain_module
from trimtab.methods.base import Method, placed
from trimtab.methods.tune.listener import Listener

# Parameters with which blocks take a cache of keys and values, or of states.
_CACHE = {"past_key_values", "past_key_value", "layer_past", "cache_params"}


class Stand(NamedTuple):
    """A side network and its place at a tower.

    Attributes:
        side: the module, `side(seen)`.
        maps: the hidden maps that it reads: 0 is what enters the first block, i what block i puts out.
        place: the output that its result replaces; None if only other side networks read it.
        memory: name of the tower whose side network's result it reads.
    """

    side: nn.Module
    maps: Sequence[int]
    place: Tap | None
    memory: str | None = None


class Beside(Method):
    """A method that sets side networks beside towers; the model keeps them as `model.<name>.<tower>`."""

    lever = "tune"
    trains = "added"
    changes = "beside"
    keeps = "its side networks stand beside the model, where the model's own class has no place for them"
    mixes_tokens = True

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        names = self.settings.towers or self.towers(anatomy)
        for name in names:
            if not anatomy.tower(name).blocks:
                raise ValueError(f"{self.name}: every block of tower {name!r} is skipped, and it reads what blocks put "
                                 "out: skip fewer of them, or name other towers in `towers`")  # fmt: skip
            anatomy.tower(name).need(self.name, "blocks", "layout", "samples", "mask", "causal", "gradient")
        self._check_read(anatomy, names)
        made = {name: self.stand(model, anatomy, anatomy.tower(name)) for name in names}
        sides = keep_modules(model, self.name, {name: m.side for name, m in made.items()})
        placed(sides, next(model.parameters()))
        for name, stand in made.items():
            if anatomy.tower(name).starts_blank and 0 in stand.maps:  # a map of zeros: only the bias can learn
                next(stand.side.down.parameters()).requires_grad_(False)  # type: ignore[union-attr]
        self.listeners = {
            name: Listener(
                self.name, anatomy.tower(name), m.side, m.maps, m.place, starts=_starts(anatomy.tower(name), m)
            )
            for name, m in made.items()
        }
        for name, stand in made.items():
            if stand.memory is not None:
                self.listeners[name].memory = self.listeners[stand.memory]
        for listener in self.listeners.values():
            listener.attach(model)
        stuck = [x.tower for x in self.listeners.values() if x.place is not None and not x.goes_on]
        self.uncached = without_cache(model, stuck)
        return anatomy

    @abstractmethod
    def stand(self, model: nn.Module, anatomy: Anatomy, tower: Tower) -> Stand:
        """The side network of a tower and its place; ValueError if the method does not apply to it."""

    def replaces(self) -> tuple[str, ...]:
        return tuple(x.place.path for x in self.listeners.values() if x.place is not None)

    def detaches(self, anatomy: Anatomy) -> tuple[str, ...]:
        return tuple(self.settings.towers or self.towers(anatomy))

    def towers(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The towers that get a side network if the settings name none: those that no other tower reads, since nothing
        is back-propagated through the reader. Paired towers, which read each other, both get one."""
        return tuple(t.name for t in anatomy.towers if not anatomy.readers(t.name))

    def _check_read(self, anatomy: Anatomy, names: Sequence[str]) -> None:
        """ValueError if a tower is named with one whose stream its output becomes: it would get no gradient."""
        for name in names:
            readers = {t.name for t in anatomy.towers if name in t.reads}
            later = readers | {t.name for t in anatomy.towers if t.memory in readers}
            if found := sorted(later & set(names) - {name}):
                raise ValueError(
                    f"{self.name}: tower {found[0]!r} reads tower {name!r}, and nothing is back-propagated through it: "
                    f"name one of the two in `towers`"
                )

    def sides(self, model: nn.Module) -> nn.ModuleDict:
        """The side networks that are attached to a model, by the keys of their towers."""
        return model.get_submodule(slot(self.name))  # type: ignore[return-value]

    def detach(self, model: nn.Module) -> None:
        """Take the side networks away; the model computes what it did before."""
        for listener in self.listeners.values():
            listener.detach()
        for config in self.uncached:
            config.use_cache = True
        delattr(model, slot(self.name))


def _starts(tower: Tower, stand: Stand) -> frozenset[int]:
    """Where shapes may change along a tower, for a side network that reads maps of any number of tokens."""
    if not getattr(stand.side, "any_length", False):
        return frozenset()
    first = set() if tower.blocks[0].keeps_shape else {0}
    return frozenset(first | stages(tower.blocks))


def slot(method: str) -> str:
    """The attribute of a model under which a method keeps what it added beside the model's own modules."""
    return method.replace("-", "_")


def key(tower: str) -> str:
    """A tower's name as a key of a `ModuleDict`, which takes no dots; discovered towers are named by paths."""
    return tower.replace(".", "-")


def keep_modules(model: nn.Module, method: str, by_tower: dict[str, nn.Module]) -> nn.ModuleDict:
    """Give a model what a method added for each tower, marked as added.

    Raises:
        ValueError: if the model has an attribute of the method's name, or two towers would have one key.
    """
    if hasattr(model, slot(method)):
        raise ValueError(
            f"{method}: this {type(model).__name__} has a {slot(method)!r} already: it is tuned with it; load the "
            "model again for another"
        )
    keys = {key(name): name for name in by_tower}
    if len(keys) < len(by_tower):
        raise ValueError(f"{method}: towers {', '.join(by_tower)} are told apart by a dot alone: rename one")
    made = nn.ModuleDict({k: mark_added(by_tower[name], method) for k, name in keys.items()})
    model.add_module(slot(method), mark_added(made, method))
    return made


def without_cache(model: nn.Module, towers: Sequence[Tower]) -> list[Any]:
    """Let `generate` go without a key-value cache unless it is asked for one: with a cache a tower is called with the
    newest token alone. Returns the generation settings that it has changed; none if no tower could have a cache."""
    blocks = [plain_module(model, tower.blocks[0].path) for tower in towers]
    if not any(_CACHE & signature(block).named for block in blocks):
        return []
    found = {id(c): c for m in model.modules() if (c := getattr(m, "generation_config", None)) is not None}
    changed = [config for config in found.values() if getattr(config, "use_cache", False)]
    for config in changed:
        config.use_cache = False
    return changed


def stages(blocks: Sequence[Block]) -> set[int]:
    """How many blocks stand before each stage but the first: a block of another shape starts one."""
    starts = (b.begins or not b.keeps_shape or a.width != b.width for a, b in pairwise(blocks))
    return {i for i, start in enumerate(starts, 1) if start}


def token_misfit(method: str, tower: Tower) -> str:
    """Why a tower is none of tokens, samples first; empty if it is one."""
    if tower.layout != "tokens":
        return (
            f"{method}: tower {tower.name!r} is a {tower.layout} tower; it needs tokens: name other towers in `towers`"
        )
    if tower.samples is not None:
        return (
            f"{method}: the stream of tower {tower.name!r} does not begin with the samples, (B, L, D): name other "
            "towers in `towers`, or take lora"
        )
    return ""


def token_width(method: str, tower: Tower) -> int:
    """Width of a tower of tokens; ValueError if it is no such tower, or has several, or several numbers of tokens."""
    widths = sorted({b.width for b in tower.blocks})
    if reason := token_misfit(method, tower):
        raise ValueError(reason)
    if len(widths) > 1:
        raise ValueError(
            f"{method}: tower {tower.name!r} has the widths {widths}; it needs tokens of one width: name other towers "
            "in `towers`, or take unipt, which reads maps of any width"
        )
    if (later := next((b.path for b in tower.blocks if b.begins), None)) is not None:
        raise ValueError(
            f"{method}: the number of tokens of tower {tower.name!r} changes before '{later}': name other "
            "towers in `towers`, or take unipt, which reads maps of any length"
        )
    return widths[0]
