"""UniPT (Diao et al., CVPR 2024): a parallel network that reads a frozen tower's block outputs.

    h_0 --block--> h_1 --block--> ... --block--> h_N          the tower: frozen, in evaluation mode, no graph kept
     |              |                             |
    Down_0         Down_1                        Down_N        D -> d each                            trained
     |              |                             |
    z_0            z_1          ...               A = z_N      (B, L, d); the anchor is the last
     |              |                             |
     +--- M_l = attend(A, z_l) ---+               |            S = L1(relu(A z_l^T * mask)),  M_l = S z_l (+ z_l)
                  |                               |
        M = sum_l c_l M_l  <--- c = softmax_l(w . (mean A * mean z_l) + b)   one confidence a layer and sample
                  |                               |
              project(M) ------------(+)----------+
                                      |
                                     Up  -> what the tower hands on from now on

Nothing is back-propagated through the tower, so that training keeps only the side network's activations. Two of the
published forms are here: `TokenUniPT` for towers that hand on tokens (CLIP-ViL, section 4.4 and `lxrt/modeling.py`) and
`VectorUniPT` for towers that hand on one vector (CLIP4Clip, `module_adapter.py`), where the anchor is that vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.anatomy import Anatomy, AnatomyError, Tap, Tower, read, rewrite
from trimtab.methods.base import METHODS, Method


@dataclass(frozen=True)
class UniPTSettings:
    """Settings of UniPT."""

    reduction: int = 2
    """Width of the side network = width of the tower / reduction (published: 2; CLIP4Clip: 1)."""
    towers: tuple[str, ...] | None = None
    """Which towers get a side network; None for all."""
    form: Literal["auto", "token", "vector"] = "auto"
    """`vector` replaces the tower's pooled vector, `token` its tokens; `auto` takes what fits the tower."""

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise ValueError(f"reduction must be at least 1, found {self.reduction}")


def attend(query: Tensor, keys: Tensor, mask: Tensor | None, eps: float, floor: bool = False) -> Tensor:
    """ReLU attention with rows of unit L1 norm: no scale, no softmax, no query, key or value maps.

    Args:
        query: (B, Q, d).
        keys: (B, L, d), also the values.
        mask: (B, L), 1 = valid; multiplies the scores before the ReLU, so that padding keys get weight 0.
        eps: guards the division: added to the norm, or with `floor` its smallest value.

    Returns:
        (B, Q, d).
    """
    scores = query @ keys.transpose(1, 2)  # (B, Q, L)
    if mask is not None:
        scores = scores * mask[:, None, :]
    scores = F.relu(scores)
    norm = scores.sum(dim=-1, keepdim=True)
    return (scores / (norm.clamp(min=eps) if floor else norm + eps)) @ keys


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over valid tokens, (B, L, d) -> (B, d); a sample without any gets zeros."""
    if mask is None:
        return x.mean(dim=1)
    return (x * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def aggregate(merged: list[Tensor], anchor: Tensor, pooled: list[Tensor], gate: nn.Linear) -> Tensor:
    """Sum of the layers' results, weighted by their confidences: softmax over layers, one weight a sample."""
    logits = torch.cat([gate(anchor * p) for p in pooled], dim=-1)  # (B, N)
    weights = logits.softmax(dim=-1)
    return sum(w[:, None, None] * m for w, m in zip(weights.unbind(dim=-1), merged, strict=True))


class TokenUniPT(nn.Module):
    """Side network of a token tower: N + 1 hidden maps of width D -> new tokens of width D (CLIP-ViL's form)."""

    def __init__(self, width: int, layers: int, reduction: int):
        super().__init__()
        d = width // reduction
        self.down = nn.ModuleList(nn.Sequential(nn.Linear(width, d), nn.LayerNorm(d)) for _ in range(layers + 1))
        self.gate = nn.Linear(d, 1)
        self.project = nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, d), nn.LayerNorm(d))
        self.up = nn.Linear(d, width)

    def forward(self, maps: list[Tensor], mask: Tensor | None) -> Tensor:
        """Hidden maps (B, L, D), from the first block's input to the last block's output -> (B, L, D)."""
        z = [down(h) for down, h in zip(self.down, maps, strict=True)]
        anchor, targets = z[-1], z[:-1]
        # The published "+ identity" on the attention weights adds z_l itself at each position.
        merged = [attend(anchor, t, mask, 1e-6) + t for t in targets]
        m = aggregate(merged, masked_mean(anchor, mask), [masked_mean(t, mask) for t in targets], self.gate)
        return self.up(anchor + self.project(m))


class VectorUniPT(nn.Module):
    """Side network of a tower that hands on one vector of width E: adds what all layers know (CLIP4Clip's form)."""

    def __init__(self, width: int, layers: int, out: int, reduction: int):
        super().__init__()
        d = out // reduction
        self.down = nn.ModuleList(nn.Linear(width, d) for _ in range(layers + 1))
        self.anchor = nn.Linear(out, d)
        self.gate = nn.Linear(d, 1)
        self.up = nn.Linear(d, out)

    def forward(self, maps: list[Tensor], mask: Tensor | None, vector: Tensor, position: Tensor | None) -> Tensor:
        """Hidden maps (B, L, D), the tower's vector (B, E), the token that it was read from (B,) or None for the first.

        Returns:
            The new vector, (B, E).
        """
        z = [down(F.relu(h)) for down, h in zip(self.down, maps, strict=True)]
        anchor = self.anchor(F.relu(vector))[:, None]  # (B, 1, d)
        rows = torch.arange(len(vector), device=vector.device)
        at = torch.zeros_like(rows) if position is None else position
        merged = [attend(anchor, t, mask, 1e-6, floor=True) + t[rows, at][:, None] for t in z]
        m = aggregate(merged, anchor[:, 0], [masked_mean(t, mask) for t in z], self.gate)
        return vector + self.up(F.relu(m))[:, 0]


@METHODS.register("unipt")
class UniPT(Method):
    """Side networks beside the frozen towers, attached through their taps."""

    name = "unipt"
    lever = "tune"
    mixes_tokens = True
    Settings = UniPTSettings

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        names = self.settings.towers or tuple(t.name for t in anatomy.towers)
        self.sides = nn.ModuleDict()
        for name in names:
            tower = anatomy.tower(name)
            self.sides[name] = self._side(model, tower)
            _Listener(model, tower, self.sides[name])
        reference = next(model.parameters())
        self.sides.to(device=reference.device)
        model.add_module("unipt", self.sides)
        model.eval()
        return anatomy

    def _side(self, model: nn.Module, tower: Tower) -> nn.Module:
        s = self.settings
        widths = {b.width for b in tower.blocks}
        if tower.layout != "tokens" or len(widths) > 1:
            raise ValueError(
                f"unipt: tower {tower.name!r} is a {tower.layout} tower of widths {sorted(widths)}; it needs tokens of "
                "one width: name other towers in `towers`"
            )
        if tower.samples is not None:
            raise ValueError(
                f"unipt: the stream of tower {tower.name!r} does not begin with the samples, (B, L, D): name other "
                "towers in `towers`"
            )
        width, layers = widths.pop(), len(tower.blocks)
        vector = s.form == "vector" or (s.form == "auto" and _hands_on_vector(model, tower))
        if not vector:
            return TokenUniPT(width, layers, s.reduction)
        if tower.pooled is None:
            raise ValueError(f"unipt: tower {tower.name!r} hands on no vector: use form 'token'")
        linear = model.get_submodule(tower.pooled.path)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"unipt: form 'vector' needs a linear projection at '{tower.pooled.path}'")
        return VectorUniPT(width, layers, linear.out_features, s.reduction)


def _hands_on_vector(model: nn.Module, tower: Tower) -> bool:
    """Two-tower models hand on a projected vector; single-stream ones hand on tokens, from which poolers read."""
    return tower.pooled is not None and isinstance(model.get_submodule(tower.pooled.path), nn.Linear)


class _Listener:
    """Collects one tower's hidden maps during a forward pass and puts the side network's result in place."""

    def __init__(self, model: nn.Module, tower: Tower, side: nn.Module):
        self.tower, self.side = tower, side
        self.maps: list[Tensor] = []
        self.mask: Tensor | None = None
        first = tower.blocks[0]
        read(model, Tap(first.path, "input", 0), self._first)
        for block in tower.blocks:
            read(model, Tap(block.path), self._next)
        if tower.mask is not None:
            read(model, tower.mask, self._seen)
        out = tower.pooled if isinstance(side, VectorUniPT) else tower.output
        rewrite(model, out, self._replace)

    def _first(self, value: Tensor) -> None:
        self.maps = [value.detach()]

    def _next(self, value: Tensor) -> None:
        if value.shape != self.maps[0].shape:
            block = self.tower.blocks[len(self.maps) - 1]
            raise AnatomyError(
                f"unipt: block '{block.path}' put out {tuple(value.shape)}, expected {tuple(self.maps[0].shape)}, "
                f"which its tower {self.tower.name!r} takes in"
            )
        self.maps.append(value.detach())

    def _seen(self, mask: Tensor | None) -> None:
        self.mask = mask

    def _replace(self, value: Tensor) -> Tensor:
        maps, mask = self.maps, self.mask
        self.maps, self.mask = [], None  # nothing of this pass outlives it
        dtype = next(self.side.parameters()).dtype
        maps = [m.to(dtype) for m in maps]
        if mask is not None:
            mask = (mask != 0).to(dtype)
        if isinstance(self.side, TokenUniPT):
            return self.side(maps, mask).to(value.dtype)
        position = None
        if self.tower.pooled_token == "last":
            if mask is None:
                position = torch.full((len(value),), maps[0].shape[1] - 1, device=value.device)
            else:
                position = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
        return self.side(maps, mask, value.detach().to(dtype), position).to(value.dtype)
