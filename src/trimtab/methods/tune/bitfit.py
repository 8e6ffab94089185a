"""BitFit (Ben Zaken et al., ACL 2022): only the towers' bias vectors are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trimtab.anatomy import Anatomy
from trimtab.anatomy.structure import plain_parameters, under
from trimtab.methods.base import METHODS, Method


@dataclass(frozen=True)
class BitFitSettings:
    """Settings of BitFit."""

    towers: tuple[str, ...] | None = None
    """Which towers; None for all."""


@METHODS.register("bitfit")
class BitFit(Method):
    """Every bias in the towers is trained, those of norms included; not those that no gradient was seen to reach."""

    lever = "tune"
    trains = "own"
    changes = "values"
    Settings = BitFitSettings

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        for name in self.settings.towers or [t.name for t in anatomy.towers]:
            tower = anatomy.tower(name)
            everywhere = {
                path: p
                for path, p in plain_parameters(model).items()
                if path.rsplit(".", 1)[-1].endswith("bias") and anatomy.owner(path) == tower
            }
            biases = {path: p for path, p in everywhere.items() if not under(path, anatomy.severed)}
            blocks = [b.path for b in tower.blocks]
            if not any(under(path, blocks) for path in biases):
                rest = f", only {', '.join(biases)} outside of them" if biases else ""
                if mute := [path for path in everywhere if under(path, blocks)]:
                    rest += f", but for those to which no gradient goes back from what it returns ('{mute[0]}')"
                raise ValueError(
                    f"bitfit: the blocks of tower {name!r} have no bias{rest} (so it is in T5 and LLaMA): name other "
                    "towers in `towers`, or tune its norms (norm-tuning)"
                )
            for bias in biases.values():
                bias.requires_grad_(True)
        return anatomy
