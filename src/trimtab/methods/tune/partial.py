"""Partial fine-tuning: the last blocks of each tower are trained, everything before them is frozen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trimtab.anatomy import Anatomy
from trimtab.anatomy.structure import plain_parameters
from trimtab.methods.base import METHODS, Method
from trimtab.methods.tune.full import train
from trimtab.settings import within


@dataclass(frozen=True)
class PartialSettings:
    """Settings of partial fine-tuning."""

    blocks: int = 2
    """How many blocks at the end of each tower are trained."""
    towers: tuple[str, ...] | None = None
    """Which towers; None for all."""

    def __post_init__(self) -> None:
        within(vars(self), blocks="[1, inf)")


@METHODS.register("partial")
class Partial(Method):
    """The last blocks of each tower are trained; nothing is back-propagated further."""

    lever = "tune"
    trains = "own"
    changes = "values"
    Settings = PartialSettings

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        k = self.settings.blocks
        for name in self.settings.towers or [t.name for t in anatomy.towers]:
            blocks = anatomy.tower(name).blocks
            if k > len(blocks):
                raise ValueError(f"partial: blocks is {k}, but tower {name!r} has {len(blocks)}")
            for block in blocks[-k:]:
                own = plain_parameters(model.get_submodule(block.path))
                train(((f"{block.path}.{name}", p) for name, p in own.items()), self.name)
        return anatomy
