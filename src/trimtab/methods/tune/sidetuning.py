"""Side-Tuning (Zhang et al., ECCV 2020): a small network beside the tower, its result blended with the tower's.

    h_0 --tower, frozen--> h_N --(x a)--+
     |                                  (+)-> what the tower hands on;  a = sigmoid(alpha), alpha starts at 0
     +--Down - SideBlock ... - Up (x 1-a)-+

Published for images; the side network reads what enters the first block, so that the frozen embeddings are shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Tower
from trimtab.methods.base import METHODS
from trimtab.methods.tune.beside import Beside, Stand, token_width
from trimtab.methods.tune.blocks import SideBlock, visible
from trimtab.methods.tune.listener import Seen
from trimtab.settings import within


@dataclass(frozen=True)
class SideTuningSettings:
    """Settings of Side-Tuning."""

    reduction: int = 4
    """Width of the side network = width of the tower / reduction."""
    blocks: int = 2
    """Blocks of the side network."""
    towers: tuple[str, ...] | None = None
    """Which towers; None for all."""

    def __post_init__(self) -> None:
        within(vars(self), reduction="[1, inf)", blocks="[1, inf)")


class Blended(nn.Module):
    """The side network and the weight with which it is blended."""

    def __init__(self, width: int, reduction: int, blocks: int, causal: bool):
        super().__init__()
        d = width // reduction
        self.causal = causal
        self.down, self.up = nn.Linear(width, d), nn.Linear(d, width)
        self.blocks = nn.ModuleList(SideBlock(d) for _ in range(blocks))
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, seen: Seen) -> Tensor:
        """What enters the tower and what it hands on, (B, L, D) both -> (B, L, D)."""
        (tokens,) = seen.maps
        x, keys = self.down(tokens.to(self.down.weight.dtype)), visible(tokens, seen.mask, self.causal)
        for block in self.blocks:
            x = block(x, keys)
        share = self.alpha.sigmoid()
        return share * seen.value + (1 - share) * self.up(x)


@METHODS.register("side-tuning")
class SideTuning(Beside):
    """A small network from a tower's input to its output, blended with the frozen tower's result."""

    Settings = SideTuningSettings

    def stand(self, model: nn.Module, anatomy: Anatomy, tower: Tower) -> Stand:
        s = self.settings
        side = Blended(token_width(self.name, tower), s.reduction, s.blocks, tower.causal)
        return Stand(side, [0], tower.output)
