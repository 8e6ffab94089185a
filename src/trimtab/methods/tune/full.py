"""The two ends between which every other method stands: train everything, or nothing but the task's head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trimtab.anatomy import Anatomy
from trimtab.methods.base import METHODS, Method


@dataclass(frozen=True)
class NoSettings:
    """A method without settings."""


@METHODS.register("full")
class Full(Method):
    """Full fine-tuning: every parameter is trained."""

    lever = "tune"
    Settings = NoSettings
    trains = "own"
    changes = "values"

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        model.requires_grad_(True)
        return anatomy


@METHODS.register("linear-probe")
class LinearProbe(Method):
    """The backbone stays as it is; only the task's head is trained."""

    lever = "tune"
    Settings = NoSettings
    trains = "nothing"
    changes = "nothing"

    def detaches(self, anatomy: Anatomy) -> tuple[str, ...]:
        return tuple(t.name for t in anatomy.towers)

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        return anatomy
