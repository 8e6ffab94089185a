"""UniPT as it is published, on the parameters of our side networks: to be read, and to be tested against.

    S_l = relu(A z_l^T * mask) / (row sums + eps)      one layer's weights: no scale, no softmax, no query or key maps
    M   = sum_l c_l (S_l + I) z_l                      c = softmax_l(gate(mean A * mean z_l)), one confidence a layer
    out = up(A + project(M))                           A is the last hidden map, taken down

All weights are made and kept, an identity matrix is added to them, and all layers' results are stacked before they are
weighted, as in the authors' code (Paranioar/UniPT). `sides` gives the same numbers and keeps much less. What the plain
computation makes of padding is nobody's to read; the lean one may leave it out.

Maps of another number of tokens than the last one's are ours: what belongs to a token's own position (I z_l, and the
token of a vector) is then left out.

Letters: B samples, L tokens, D the tower's width, d the side network's, E of a vector, N layers beside the anchor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.methods.tune.listener import Seen
from trimtab.methods.tune.unipt.sides import DecoderUniPT, GridUniPT, PyramidUniPT, TokenUniPT, VectorUniPT


def mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, d) -> (B, d), over valid tokens."""
    if mask is None:
        return x.mean(dim=1)
    return (x * mask[..., None]).sum(dim=1) / mask[..., None].sum(dim=1).clamp(min=1)


def weights(query: Tensor, keys: Tensor, mask: Tensor | None, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, Q, d), (B, L, d) -> rows of unit sum (B, Q, L); `norm` guards the sums."""
    scores = query @ keys.permute(0, 2, 1)  # (B, Q, L)
    if mask is not None:
        scores = scores * mask[:, None]
    scores = torch.relu(scores)
    return scores / norm(scores.abs().sum(dim=-1, keepdim=True))


def weighted_sum(merged: list[Tensor], logits: list[Tensor]) -> Tensor:
    """N of (B, Q, d) by the softmax of N of (B, 1) -> (B, Q, d)."""
    confidence = torch.softmax(torch.cat(logits, dim=1), dim=1)  # (B, N)
    return (torch.stack(merged, dim=1) * confidence[:, :, None, None]).sum(dim=1)


def attended(side: TokenUniPT | PyramidUniPT, anchor: Tensor, targets: list[Tensor], mask: Tensor | None,
             pool: Tensor | None) -> Tensor:  # fmt: skip
    """M of the anchor (B, L, d) and N targets (B, L_l, d) -> (B, L, d)."""
    merged, logits = [], []
    for z in targets:
        s = weights(anchor, z, mask, lambda n: n + side.how.eps)  # (B, L, L_l)
        if z.shape[1] == anchor.shape[1]:
            s = s + torch.eye(s.shape[-1], device=s.device)
        merged.append(s @ z)  # (B, L, d)
        logits.append(side.gate(mean(anchor, pool) * mean(z, pool)))  # (B, 1)
    return weighted_sum(merged, logits)


def tokens(side: TokenUniPT, seen: Seen) -> Tensor:
    """CLIP-ViL's joint tower, VSE's texts, MDETR's encoder."""
    z = [down(h) for down, h in zip(side.down, seen.maps, strict=True)]  # N + 1 of (B, L, d)
    merged = attended(side, z[-1], z[:-1], seen.mask, seen.mask)  # (B, L, d)
    return side.up(z[-1] + side.project(merged))  # (B, L, out)


def decoder(side: DecoderUniPT, seen: Seen) -> Tensor:
    """MDETR's decoder: every layer first reads what the encoder's side network made."""
    maps = [*seen.maps[:-1], seen.value[-1]] if side.levels else seen.maps
    *targets, anchor = (down(h) for down, h in zip(side.down, maps, strict=True))  # (B, L, d) each
    memory = seen.memory
    assert memory is not None  # (B, M, d)
    for i, z in enumerate(targets):
        read = weights(z, memory, seen.memory_mask, lambda n: n + side.how.eps) @ memory  # (B, L, d)
        targets[i] = z + side.cross[i](read)
    final = anchor + side.project(attended(side, anchor, targets, seen.mask, seen.mask))  # (B, L, d)
    return side.up(torch.stack([*targets, final]) if side.levels else final)  # (N + 1, B, L, out) or (B, L, out)


def vectors(side: VectorUniPT, seen: Seen) -> Tensor:
    """CLIP4Clip's texts and frames: the tower's vector is the anchor."""
    vector, rows = seen.value, torch.arange(len(seen.value))
    at = torch.zeros_like(rows) if seen.position is None else seen.position
    anchor = side.anchor(torch.relu(vector))[:, None]  # (B, 1, d)
    merged, logits = [], []
    for down, h in zip(side.down, seen.maps, strict=True):
        z = down(torch.relu(h.to(vector.dtype)))  # (B, L, d)
        m = weights(anchor, z, seen.mask, lambda n: n.clamp(min=side.how.eps)) @ z  # (B, 1, d)
        merged.append(m + z[rows, at][:, None] if h.shape[1] == seen.maps[-1].shape[1] else m)
        logits.append(side.gate(anchor[:, 0] * mean(z, seen.mask)))  # (B, 1)
    return vector + side.up(torch.relu(weighted_sum(merged, logits)))[:, 0]  # (B, E)


def pyramid(side: PyramidUniPT, seen: Seen) -> Tensor:
    """VSE's images: the last grid says how the cells of larger ones are pooled."""
    *grids, last = seen.maps  # (B, C_l, r n, r n), (B, C, n, n)
    anchor = side.down[-1](last)  # (B, d, n, n)
    targets = []
    for guide, down, grid in zip(side.guide, side.down, grids, strict=False):
        rate = grid.shape[-1] // last.shape[-1]
        mixed = F.interpolate(torch.relu(guide(last)), size=grid.shape[2:], mode="nearest") * grid  # (B, C_l, r n, r n)
        cells = torch.relu(F.unfold(mixed.sum(dim=1, keepdim=True), rate, stride=rate))  # (B, r r, n n)
        cells = cells / (cells.abs().sum(dim=1, keepdim=True) + side.how.eps)
        share = F.fold(cells, grid.shape[2:], rate, stride=rate) + 1 / rate**2  # (B, 1, r n, r n)
        pooled = F.avg_pool2d(share * grid, rate, stride=rate, divisor_override=1)  # (B, C_l, n, n)
        targets.append(_flat(down(pooled)))  # (B, n n, d)
    merged = attended(side, _flat(anchor), targets, None, None)  # (B, n n, d)
    grown = anchor + side.project(merged.permute(0, 2, 1).reshape(anchor.shape))  # (B, d, n, n)
    return _flat(side.up(torch.relu(grown)))  # (B, n n, out)


def grid(side: GridUniPT, seen: Seen) -> Tensor:
    """The same, as the grid that a tower hands on."""
    return pyramid(side, seen).transpose(1, 2).reshape(seen.value.shape)  # (B, out, n, n)


def _flat(grid: Tensor) -> Tensor:
    return grid.flatten(2).permute(0, 2, 1)  # (B, n n, C)


_PLAIN: dict[type, Callable] = {
    TokenUniPT: tokens, DecoderUniPT: decoder, VectorUniPT: vectors, PyramidUniPT: pyramid, GridUniPT: grid,
}  # fmt: skip


def plain(side: torch.nn.Module, seen: Seen) -> Tensor:
    """What a side network makes of what its tower showed, computed as published; `seen` stays as it is."""
    return _PLAIN[type(side)](side, seen)
