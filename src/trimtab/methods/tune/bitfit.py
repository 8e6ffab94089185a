"""BitFit (Ben Zaken et al., ACL 2022): only the towers' bias vectors are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trimtab.anatomy import Anatomy
from trimtab.anatomy.structure import plain_parameters
from trimtab.methods.base import METHODS, Method


@dataclass(frozen=True)
class BitFitSettings:
    """Settings of BitFit."""

    towers: tuple[str, ...] | None = None
    """Which towers; None for all."""


@METHODS.register("bitfit")
class BitFit(Method):
    """Every bias in the towers is trained, those of norms included."""

    lever = "tune"
    trains = "own"
    changes = "values"
    Settings = BitFitSettings

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        for name in self.settings.towers or [t.name for t in anatomy.towers]:
            tower = anatomy.tower(name)
            biases = [
                p
                for path, p in plain_parameters(model).items()
                if path.rsplit(".", 1)[-1].endswith("bias") and anatomy.owner(path) == tower
            ]
            if not biases:
                raise ValueError(f"bitfit: tower {name!r} has no bias (T5 has none): name others in `towers`")
            for bias in biases:
                bias.requires_grad_(True)
        return anatomy
