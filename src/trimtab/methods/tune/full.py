"""The two ends between which every other method stands: train everything, or nothing but the task's head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from trimtab.anatomy import Anatomy
from trimtab.methods.base import METHODS, Method


@dataclass(frozen=True)
class NoSettings:
    """A method without settings."""


def train(parameters: Iterable[tuple[str, nn.Parameter]], by: str) -> None:
    """Let parameters be trained; ValueError if one is stored as something that has no gradient (quantised)."""
    found = list(parameters)
    for path, parameter in found:
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(
                f"{by}: '{path}' is stored as {str(parameter.dtype).removeprefix('torch.')} (quantised) and cannot be "
                "trained: load the model unquantised, or train beside it (lora, unipt, adapter)"
            )
    for _, parameter in found:
        parameter.requires_grad_(True)


@METHODS.register("full")
class Full(Method):
    """Full fine-tuning: every parameter is trained."""

    lever = "tune"
    Settings = NoSettings
    trains = "own"
    changes = "values"

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        train(model.named_parameters(), self.name)
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
