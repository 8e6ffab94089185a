"""A small model whose blocks are residual, for tests of masks."""

from __future__ import annotations

import torch
from torch import nn

from trimtab import Anatomy, Block, Masks, Tap, Tower


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.value(self.query(x).relu())


class Stack(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(Residual(width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def anatomy(self) -> Anatomy:
        blocks = tuple(Block(f"blocks.{i}", self.width, stream="x") for i in range(len(self.blocks)))
        return Anatomy((Tower("vision", "vision", blocks, ("blocks",), Tap(blocks[-1].path)),))


def check_zeros(model: nn.Module, masks: Masks) -> None:
    """Every pruned weight is exactly zero, and every other is not."""
    parameters = dict(model.named_parameters())
    for path, mask in masks.items():
        assert torch.equal(parameters[path] != 0, mask), path
        assert not torch.signbit(parameters[path][~mask]).any(), f"{path}: -0.0 is no saving on disk"
