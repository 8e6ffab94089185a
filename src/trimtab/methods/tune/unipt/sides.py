"""The side networks of UniPT's published uses; all share `core`.

| class | reads | hands on | published for |
|---|---|---|---|
| `TokenUniPT` | hidden maps (B, L, D) | tokens (B, L, out) | CLIP-ViL's joint tower, VSE's texts |
| `DecoderUniPT` | the same, and another side's tokens | tokens, or all levels | MDETR's decoder |
| `VectorUniPT` | hidden maps and the tower's vector (B, E) | a vector (B, E) | CLIP4Clip's texts and frames |
| `PyramidUniPT` | grids (B, C_l, r_l n, r_l n) | tokens (B, n n, out) | VSE's images |
| `GridUniPT` | the same | the last grid (B, out, n, n) | none |

Each is called with what its tower showed, `side(seen)`; `layers` says among how many maps its confidences choose. The
maps may differ in width, as in the published code: each has a linear map of its own. Of token forms they may differ in
their number of tokens too (Swin, PVT, SegFormer), which no published use has: see `core` for what is computed then.
`plain.py` has the same computations as they are published. Weights start as torch's own defaults, as those of VSE and
CLIP4Clip do in the published code; `initialise` draws them as those of MDETR and CLIP-ViL start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.methods.tune.listener import Seen
from trimtab.methods.tune.unipt.core import Keep, attend, check_lengths, confidences, merge
from trimtab.methods.tune.unipt.down import Target, down, down_grid, project, some, spread
from trimtab.methods.tune.unipt.pools import guided_down, read_vector
from trimtab.methods.tune.unipt.steps import newest

Final = Literal["linear", "relu", "relu-norm", "none"]


@dataclass(frozen=True)
class Computation:
    """How a side network computes.

    Attributes:
        projection: of the merged tokens: `double` is Linear(d, D), ReLU, Linear(D, d), LN (CLIP-ViL, MDETR), `single`
            Linear(d, d), LN (VSE; CLIP-ViL's published parameter count fits this one).
        final: of the sum: `linear` (CLIP-ViL), `relu` then linear (VSE), `relu-norm` with a LayerNorm after it (MDETR's
            decoder), or `none`: d-wide tokens for a decoder's side network (MDETR's encoder).
        eps: added to the row sums of attention.
        causal: a token sees only those up to itself, in attention and in confidences (ours: no published use has it).
        keep: keep the attention scores for the backward pass: faster, L numbers more a token and layer; see `attend`.
        kept: precision in which hidden maps are kept for the backward pass, None for their own. Results are the same;
            gradients of the down-projections' weights see the rounding.
        skip_padding: leave padding out of all products: what is handed on of it is 0. Otherwise it is what the
            published code makes of it, which nothing may read.
        first: hand on the first token alone, (B, 1, out), for heads that read no other: the same numbers without the
            other tokens' attention and projections. Not with `causal`, where the first token sees only itself.

    Raises:
        ValueError: for `first` with `causal`.
    """

    projection: Literal["double", "single"] = "double"
    final: Final = "linear"
    eps: float = 1e-6
    causal: bool = False
    keep: Keep = "auto"
    kept: torch.dtype | None = None
    skip_padding: bool = True
    first: bool = False

    def __post_init__(self) -> None:
        if self.first and self.causal:
            raise ValueError("unipt: `tokens: first` of a causal tower, whose first token sees itself alone: use `all`")


PUBLISHED: dict[str, Computation] = {
    "vse-text": Computation("single", "relu", 1e-8),
    "vse-image": Computation(eps=1e-8),
    "clip-vil": Computation("double", "linear", 1e-6),
    "mdetr-encoder": Computation("double", "none", 1e-7),
    "mdetr-decoder": Computation("double", "relu-norm", 1e-7),
}
"""How each published use computes."""


@torch.no_grad()
def initialise(side: nn.Module, how: Literal["torch", "bert", "xavier"]) -> None:
    """Draw a side network's matrices anew: `torch` leaves them as they are, `bert` is N(0, 0.02) with biases of 0
    (CLIP-ViL: `init_bert_weights` goes over the whole model), `xavier` is Xavier's uniform (MDETR; biases stay)."""
    for parameter in side.parameters():
        if how == "xavier" and parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    for module in side.modules():
        if how == "bert" and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def each(width: int | Sequence[int], maps: int) -> list[int]:
    """The width of each of so many maps; ValueError if there are more or fewer widths."""
    widths = [width] * maps if isinstance(width, int) else list(width)
    if len(widths) != maps:
        raise ValueError(f"unipt: {maps} hidden maps are read, found {len(widths)} widths: {widths}")
    return widths


class TokenUniPT(nn.Module):
    """Side network of a token tower: N + 1 hidden maps -> new tokens.

    z_l = LN(Linear(h_l)), A = z_N; out = up(A + project(merge(A, z_0 .. z_{N-1}))).

    Args:
        width: D of the hidden maps, or of each, from the first to the last.
        layers: how many maps are attended to (N); one more is the anchor.
        reduction: width of the side network is d = out / reduction.
        how: it computes.
        out: width of what it hands on; None for the last map's.

    Raises:
        ValueError: if there are not N + 1 widths.
    """

    any_length = True

    @property
    def goes_on(self) -> bool:
        """Whether it can work on the newest tokens, with a cache of those before (`steps`)."""
        return self.how.causal

    @property
    def zeroes(self) -> bool:
        """Whether it hands on 0 where the mask is."""
        return self.how.skip_padding

    def __init__(self, width: int | Sequence[int], layers: int, reduction: int, how: Computation | None = None,
                 out: int | None = None):  # fmt: skip
        super().__init__()
        widths = each(width, layers + 1)
        last = widths[-1]
        out = last if out is None else out
        how = self.how = how or Computation()
        d = self.width = out // reduction
        self.layers, self.out = layers, d if how.final == "none" else out
        self.down: Any = nn.ModuleList(nn.Sequential(nn.Linear(w, d), nn.LayerNorm(d)) for w in widths)
        self.gate = nn.Linear(d, 1)
        self.project = (
            nn.Sequential(nn.Linear(d, last), nn.ReLU(), nn.Linear(last, d), nn.LayerNorm(d))
            if how.projection == "double"
            else nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d))
        )
        self.up: nn.Module = nn.Linear(d, out)
        if how.final.startswith("relu"):
            norm = [nn.LayerNorm(out)] if how.final == "relu-norm" else []
            self.up = nn.Sequential(nn.ReLU(), self.up, *norm)
        elif how.final == "none":
            self.up = nn.Identity()

    def forward(self, seen: Seen) -> Tensor:
        """Hidden maps (B, L_l, D_l), from the first to the last, (B, L, D), and valid tokens (B, L), which need L_l = L
        for all, or None -> (B, L or 1, out)."""
        how, mask = self.how, seen.mask
        check_lengths(seen.maps, mask, how.causal)
        if seen.past is not None and (out := self.going_on(seen)) is not None:
            return out
        where = some(mask.flatten()) if mask is not None and how.skip_padding else None
        targets = [down(layer, h, how.kept, where) for layer, h in zip(self.down, seen.take(), strict=True)]
        anchor = targets.pop()
        merged = merge(anchor, targets, mask, self.gate, how.eps, how.causal, how.keep, how.skip_padding, how.first)
        if how.first:
            out = self.up(anchor.first() + project(self.project, merged).tokens())
            return out if mask is None or not how.skip_padding else out * mask[:, :1, None].to(out.dtype)
        tokens = anchor.tokens()
        if where is not None:
            tokens, merged = (x.flatten(0, 1).index_select(0, where) for x in (tokens, merged))
        out = self.up(tokens + project(self.project, merged).tokens())
        if where is not None and mask is not None:
            return spread(out, where, mask.shape)
        return out if mask is None or not how.skip_padding else out * mask[..., None].to(out.dtype)

    def going_on(self, seen: Seen) -> Tensor | None:
        """What it hands on of the newest tokens, (B, q, out); None of the first, which are only kept."""
        past = seen.past
        assert past is not None
        new, first = self.levels_of(seen), not past.tokens
        every = past.add(new)
        return None if first else newest(self, new, every, seen)

    def levels_of(self, seen: Seen) -> Tensor:
        """z of all layers and the anchor, (B, N + 1, L, d); `seen` stays as it is."""
        dtype = self.gate.weight.dtype
        return torch.stack([layer(h.to(dtype)) for layer, h in zip(self.down, seen.maps, strict=True)], dim=1)


class DecoderUniPT(TokenUniPT):
    """Side network of a decoder: its maps first read the memory that the encoder's side network made.

    z_l = D_l + LN(Linear(attend(D_l, memory))), without the identity term; the anchor does not (MDETR, section 3.4 and
    `models/transformer.py`).

    Args:
        as of `TokenUniPT`; `skip_padding` is of the memory's padding. The memory must be d wide.
        levels: the tower hands on all its levels at once, behind a norm, (N + 1, B, L, out): so does this, every z_l
            beside the result, for auxiliary losses. The anchor is then the last level behind the norm; the other maps
            have none.
    """

    def __init__(self, width: int | Sequence[int], layers: int, reduction: int, how: Computation | None = None,
                 out: int | None = None, levels: bool = False):  # fmt: skip
        super().__init__(width, layers, reduction, how, out)
        d, self.levels = self.width, levels
        self.cross: Any = nn.ModuleList(
            nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d)) for _ in range(len(self.down) - 1)
        )

    def forward(self, seen: Seen) -> Tensor:
        """Maps (B, L, D), memory (B, M, d), their masks -> (B, L, out), with `levels` (N + 1, B, L, out)."""
        how, mask = self.how, seen.mask
        assert seen.memory is not None
        check_lengths(seen.maps, mask, how.causal)
        if seen.past is not None and (out := self.going_on(seen)) is not None:
            return out
        if self.levels:
            seen.maps[-1] = seen.value[-1].clone()  # a part of the stack would keep all of it for the backward pass
        targets = [down(layer, h, how.kept) for layer, h in zip(self.down, seen.take(), strict=True)]
        anchor = targets.pop()
        crossed = []
        for target, cross in zip(targets, self.cross, strict=True):
            crossed.append(target.tokens() + down(cross, self._read(target, seen)).tokens())
        merged = merge(anchor, [Target(z) for z in crossed], mask, self.gate, how.eps, how.causal, how.keep)
        final = anchor.tokens() + project(self.project, merged).tokens()
        return self.up(torch.stack([*crossed, final]) if self.levels else final)

    @property
    def goes_on(self) -> bool:
        return super().goes_on and not self.levels

    @property
    def zeroes(self) -> bool:
        return False

    def levels_of(self, seen: Seen) -> Tensor:
        """As of the other, the layers after they have read the memory."""
        assert seen.memory is not None
        *layers, anchor = super().levels_of(seen).unbind(dim=1)
        crossed = [
            z + down(cross, self._read(Target(z), seen)).tokens() for z, cross in zip(layers, self.cross, strict=True)
        ]
        return torch.stack([*crossed, anchor], dim=1)

    def _read(self, target: Target, seen: Seen) -> Tensor:
        """What a layer reads of the memory, (B, L, d)."""
        how, memory = self.how, Target(seen.memory)  # type: ignore[arg-type]
        return attend(target, [memory], seen.memory_mask, how.eps, keep=how.keep, skip_padding=how.skip_padding)


class VectorUniPT(nn.Module):
    """Side network of a tower that hands on one vector of width E: adds what all layers know (CLIP4Clip's form).

    z_l = Linear(relu(h_l)), a = Linear(relu(vector)); out = vector + up(relu(sum_l c_l (s_l z_l + z_l[position]))).

    Since z_l is linear, it is never made: a . z_l = (W^T a) . relu(h_l) + a . b, and sums over tokens commute with W.
    A map whose number of tokens is not the last one's has no token at the vector's position: there z_l[position] is
    left out.
    """

    any_length = True

    def __init__(self, width: int | Sequence[int], layers: int, out: int, reduction: int,
                 how: Computation | None = None):  # fmt: skip
        super().__init__()
        d, self.how, self.layers = out // reduction, how or Computation(), layers + 1  # the last map is attended to too
        self.down: Any = nn.ModuleList(nn.Linear(w, d) for w in each(width, layers + 1))
        self.anchor = nn.Linear(out, d)
        self.gate = nn.Linear(d, 1)
        self.up = nn.Linear(d, out)

    def forward(self, seen: Seen) -> Tensor:
        """Hidden maps (B, L, D), the tower's vector as `value`, the `position` of its token -> a new vector, (B, E)."""
        vector, mask, position = seen.value, seen.mask, seen.position
        check_lengths(seen.maps, mask)
        anchor = self.anchor(F.relu(vector))  # (B, d)
        rows = torch.arange(len(vector), device=vector.device)
        at = torch.zeros_like(rows) if position is None else position
        merged, means, length = [], [], seen.maps[-1].shape[1]
        for linear, h in zip(self.down, seen.take(), strict=True):
            key, offset = anchor @ linear.weight, anchor @ linear.bias  # (B, D), (B,)
            attended, share, mean = read_vector(h, key, offset, mask, self.how.eps, self.how.kept)
            with torch.no_grad():  # of the frozen maps alone
                placed = h.shape[1] == length
                own = F.relu(h[rows, at]) if placed else h.new_zeros(len(h), h.shape[-1])
            # Rows of the attended sum, of the own token and of the mean; each gets as much bias as it has weight.
            tokens = torch.stack([attended, own.to(attended), mean], dim=1).to(linear.weight.dtype)  # (B, 3, D)
            ones = torch.ones_like(share)
            valid = ones if mask is None else mask.sum(dim=1).clamp(max=1).to(ones)
            amount = torch.stack([share, ones * placed, valid], dim=1)[..., None].to(tokens)  # (B, 3, 1)
            attended, own, mean = (tokens @ linear.weight.T + amount * linear.bias).unbind(dim=1)
            merged.append(attended + own)
            means.append(mean)
        weights = confidences(anchor, means, self.gate)  # (B, N)
        total = (torch.stack(merged, dim=1) * weights[..., None]).sum(dim=1)  # vectors: stacking costs nothing
        return vector + self.up(F.relu(total))


class PyramidUniPT(nn.Module):
    """Side network of a convolutional tower: the last grid guides how the earlier, larger ones are pooled (VSE).

    Each earlier grid is shrunk to the last one's size by `guided_pool`, put through a 1x1 convolution and BatchNorm,
    and attended to as tokens.

    Args:
        channels: of the grids, the last one's last.
        out: width of the tokens that it hands on.
        reduction: width of the side network is d = out / reduction.
        how: it computes: `eps`, also added to the sums of pooling, `keep` and `kept`.
    """

    def __init__(self, channels: list[int], out: int, reduction: int, how: Computation = PUBLISHED["vse-image"]):
        super().__init__()
        d, self.how, self.out, self.layers = out // reduction, how, out, len(channels) - 1
        self.down: Any = nn.ModuleList(nn.Sequential(nn.Conv2d(c, d, 1), nn.BatchNorm2d(d)) for c in channels)
        self.guide: Any = nn.ModuleList(nn.Conv2d(channels[-1], c, 1) for c in channels[:-1])
        self.gate = nn.Linear(d, 1)
        self.project = nn.Sequential(nn.Conv2d(d, d, 1), nn.BatchNorm2d(d))
        self.up = nn.Conv2d(d, out, 1)

    def forward(self, seen: Seen) -> Tensor:
        """Grids (B, C_l, r_l n, r_l n), from the largest to the last, (B, C, n, n) -> tokens (B, n n, out), row by row.

        Raises:
            ValueError: if a grid's sides are no multiples of the last one's, or as long.
        """
        how, grids = self.how, list(seen.take())
        kept, last = how.kept or grids[-1].dtype, grids[-1].to(self.gate.weight.dtype)
        n, m = last.shape[-2:]
        cells = last.flatten(2).transpose(1, 2).contiguous()  # (B, n m, C): 1x1 convolutions are products with these
        targets = []
        for i, grid in enumerate(grids[:-1]):
            if grid.shape[-2] % n or grid.shape[-2] * m != grid.shape[-1] * n:
                sides = f"{tuple(grid.shape[-2:])} and {(n, m)}"
                raise ValueError(
                    f"unipt: grid {i} and the last are {sides}: expected whole multiples in both directions"
                )
            if grid.shape[-2] == n:  # the guide would have one place to choose from, and get no gradient
                raise ValueError(
                    f"unipt: grid {i} of those that are read is {(n, m)} as the last is, expected a larger one, of "
                    "which the last guides the pooling: name in `layers` blocks that put out larger grids"
                )
            guide = F.linear(cells, self.guide[i].weight.flatten(1), self.guide[i].bias)
            targets.append(guided_down(self.down[i], guide, grid, m, how.eps, kept))
        anchor = down_grid(self.down[-1], cells, kept)
        merged = merge(anchor, targets, None, self.gate, how.eps, keep=how.keep)
        grown = anchor.tokens() + down_grid(self.project, merged).tokens()
        return F.linear(F.relu(grown), self.up.weight.flatten(1), self.up.bias)


class GridUniPT(PyramidUniPT):
    """The same for a tower that hands on its last grid: the tokens as a grid (B, out, n, n)."""

    def forward(self, seen: Seen) -> Tensor:
        """As `PyramidUniPT`, `value` being what the tower hands on.

        Raises:
            ValueError: also if that is no grid of the same shape.
        """
        tokens, value = super().forward(seen), seen.value
        new = tokens.transpose(1, 2)  # (B, out, n n)
        if value.ndim != 4 or new.shape[1:] != value.flatten(2).shape[1:]:
            raise ValueError(
                f"unipt: the tower hands on {tuple(value.shape)}, its side network makes {tuple(new.shape)}: describe "
                "the tower up to its last grid"
            )
        return new.reshape(value.shape)
