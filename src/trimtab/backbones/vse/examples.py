"""Tiny models of VSE-infinity, with random weights, and what they are called with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import BERT, BIG_PAIR, CNN, TEXT, pixels
from trimtab.backbones.vse.model import VseConfig, VseInfinity


def build(cnn: dict[str, Any] | None) -> nn.Module:
    return VseInfinity(VseConfig(dict(BERT), cnn, features=20 if cnn is None else 128, embed=16))


EXAMPLES: dict[str, Example] = {
    "vse": Example("VSE-infinity, grid", partial(build, CNN), BIG_PAIR),
    "vse-regions": Example(
        "VSE-infinity, regions", partial(build, None),
        {**TEXT, "pixel_values": pixels(2, 4, 20), "valid": torch.tensor([[True] * 4, [True] * 3 + [False]])},
    ),
}  # fmt: skip
