"""UniPT on the newest tokens of a causal tower, whose earlier ones lie in a cache: generation without doing all again.

A causal token sees those up to itself, and its confidences are means up to itself, so that nothing of an earlier token
changes when a later one comes. Kept are the layers z_l and the anchor, (N + 1) d numbers a token:

    S = relu(A_new z_l^T)  over all tokens so far        A_new, z_l[new]: of the new tokens, made now
    M = sum_l c_l (S_l / sums z_l + z_l[new])            c from running means: old sums, and the new tokens'

No published use generates. The numbers are those of `TokenUniPT.forward` on the whole sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.methods.tune.listener import Seen
from trimtab.methods.tune.unipt.core import confidences
from trimtab.methods.tune.unipt.down import project


def newest(side: Any, new: Tensor, every: Tensor, seen: Seen) -> Tensor:
    """What a side network hands on of the newest tokens.

    Args:
        side: a causal `TokenUniPT`, or `DecoderUniPT` without levels.
        new: z of the N layers and the anchor, of the newest tokens, (B, N + 1, q, d).
        every: the same of all tokens so far, (B, N + 1, L, d), the newest at the end.
        seen: with the mask of all tokens, (B, L), or None.

    Returns:
        (B, q, out).
    """
    count, total = new.shape[2], every.shape[2]
    valid = new.new_ones(len(new), total) if seen.mask is None else seen.mask
    anchor, layers = new[:, -1], every[:, :-1]  # (B, q, d), (B, N, L, d)
    visible = torch.ones(count, total, dtype=new.dtype, device=new.device).tril(total - count) * valid[:, None]
    scores = (anchor[:, None] @ layers.transpose(2, 3)).relu() * visible[:, None]  # (B, N, q, L)
    sums = scores.sum(dim=-1, keepdim=True)
    attended = scores / torch.where(sums > 0, sums + side.how.eps, 1.0) @ layers + new[:, :-1]  # (B, N, q, d)
    chosen = confidences(*_means(new, every, valid), side.gate)  # (B, q, N)
    merged = (attended * chosen.transpose(1, 2)[..., None]).sum(dim=1)  # (B, q, d)
    out = side.up(anchor + project(side.project, merged).tokens())
    return out * valid[:, -count:, None] if side.zeroes else out


def _means(new: Tensor, every: Tensor, valid: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Running means at the newest tokens: the anchor's (B, q, d), and each layer's."""
    count = new.shape[2]
    before = every.shape[2] - count
    weights = valid[:, None, :, None]
    sums = (every[:, :, :before] * weights[:, :, :before]).sum(dim=2, keepdim=True)
    sums = sums + (new * weights[:, :, before:]).cumsum(dim=2)  # (B, N + 1, q, d)
    counts = valid.cumsum(dim=1)[:, None, before:, None].clamp(min=1)
    *layers, anchor = (sums / counts).unbind(dim=1)
    return anchor, layers
