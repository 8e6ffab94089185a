"""SHERL (Diao et al., ECCV 2024), UniPT's successor: shallow layers are merged early, the last block stays in the path.

    h_0 --block--> h_1 ... --block--> h_{N-1} --(+)--> last block, frozen, back-propagated through --> as usual
     |              |                   |      ^
    Down_0         Down_1            Down_{N-1}|       z = (W2 u + u) * sigmoid(W3 u), u = relu(W1 h)
     +-- shallow ---+                  deep    |
           |   redundancy, attention    |      |       r_l = sum_m relu(cos(z_l, z_m))
           +-----> sum_l a_l z_l + deep +- Out-+       a = L1 over l of relu(w . (z_l * deep)) / r_l, a token at a time

The last block gets Out(relu(.)) + tanh(g / 0.1) h_{N-1}, with g = 0 at first. This is the computation of the authors'
code for CLIP-ViL and T5 (Paranioar/SHERL); its VSE variant has a linear map with LayerNorm as Down. Ours: the scores'
bias starts at 1, so that the ReLU cuts no layer off before it has learned anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.anatomy import Anatomy, Tap, Tower
from trimtab.methods.base import METHODS
from trimtab.methods.tune.beside import Beside, Stand, token_width
from trimtab.methods.tune.listener import Seen
from trimtab.settings import within


@dataclass(frozen=True)
class SHERLSettings:
    """Settings of SHERL."""

    reduction: int = 2
    """Width of the side network = width of the tower / reduction."""
    towers: tuple[str, ...] | None = None
    """Which towers; None for all."""

    def __post_init__(self) -> None:
        within(vars(self), reduction="[1, inf)")


class GatedDown(nn.Module):
    """(W2 u + u) * sigmoid(W3 u) with u = relu(W1 h), (..., D) -> (..., d)."""

    def __init__(self, width: int, d: int):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(width, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        u = F.relu(self.first(x.to(self.first.weight.dtype)))
        return (self.second(u) + u) * self.third(u).sigmoid()


class MultiTier(nn.Module):
    """Shallow maps merged under the guidance of the deepest: what the last block is given."""

    def __init__(self, width: int, maps: int, reduction: int, temperature: float = 0.1):
        super().__init__()
        d = width // reduction
        self.down = nn.ModuleList(GatedDown(width, d) for _ in range(maps))
        self.attention = nn.Linear(d, 1)
        nn.init.ones_(self.attention.bias)
        self.up = nn.Linear(d, width)
        self.gate = nn.Parameter(torch.zeros(()))
        self.temperature = temperature

    def forward(self, seen: Seen) -> Tensor:
        """Inputs of all blocks, (B, L, D) each -> the last block's new input, (B, L, D)."""
        *shallow, deep = (down(h) for down, h in zip(self.down, seen.maps, strict=True))
        z = torch.stack(shallow, dim=2)  # (B, L, N - 1, d)
        unit = z / (z.square().sum(dim=-1, keepdim=True).sqrt() + 1e-6)
        redundancy = F.relu(unit @ unit.transpose(2, 3)).sum(dim=-1, keepdim=True)  # (B, L, N - 1, 1)
        # A map that is all zeros is like none, itself neither: the guard is ours.
        scores = F.relu(self.attention(z * deep[:, :, None])) / redundancy.clamp(min=1e-6)
        shares = scores / (scores.sum(dim=2, keepdim=True) + 1e-6)
        merged = (shares * z).sum(dim=2) + deep
        return self.up(F.relu(merged)) + torch.tanh(self.gate / self.temperature) * seen.maps[-1].to(merged.dtype)


@METHODS.register("sherl")
class SHERL(Beside):
    """Merges the inputs of all blocks and gives the result to the last one."""

    Settings = SHERLSettings

    def stand(self, model: nn.Module, anatomy: Anatomy, tower: Tower) -> Stand:
        width, count = token_width(self.name, tower), len(tower.blocks)
        if count < 2:
            raise ValueError(f"sherl: tower {tower.name!r} has {count} block; it needs one before the last")
        place = Tap(tower.blocks[-2].path)  # what it puts out is what the last block takes in
        return Stand(MultiTier(width, count, self.settings.reduction), range(count), place)
