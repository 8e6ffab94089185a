"""Norm tuning (LayerNorm tuning: Zhao et al., ICLR 2024): only the towers' normalisation layers are trained.

PEFT's `LN_TUNING` does the same on copies of the layers, so that they can be switched off; here the layers themselves
are trained, and a trained model can be exported.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trimtab.anatomy import Anatomy
from trimtab.anatomy.structure import plain_modules, under
from trimtab.methods.base import METHODS, Method


@dataclass(frozen=True)
class NormTuningSettings:
    """Settings of norm tuning."""

    towers: tuple[str, ...] | None = None
    """Which towers; None for all."""


@METHODS.register("norm-tuning")
class NormTuning(Method):
    """Scales and shifts of LayerNorm, RMSNorm, BatchNorm and their like; running statistics stay frozen."""

    lever = "tune"
    trains = "own"
    changes = "values"
    Settings = NormTuningSettings

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        for name in self.settings.towers or [t.name for t in anatomy.towers]:
            tower = anatomy.tower(name)
            own = {p: m for p, m in plain_modules(model) if anatomy.owner(p) == tower}
            norms = [m for p, m in own.items() if "Norm" in type(m).__name__ and not under(p, anatomy.severed)]
            if not any(True for m in norms for _ in m.parameters(recurse=False)):
                raise ValueError(f"norm-tuning: tower {name!r} has no norms with parameters: name others in `towers`")
            for norm in norms:
                if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    norm.register_forward_pre_hook(_hold_statistics)
                norm.requires_grad_(True)
        return anatomy


def _hold_statistics(norm: nn.Module, args: tuple) -> None:
    """Normalise by the pretrained statistics in training too: a small task's batches say less than they do."""
    norm.training = False
