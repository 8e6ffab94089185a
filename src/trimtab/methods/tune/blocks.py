"""The small transformer block of which Side-Tuning's and LST's side networks are made."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SideBlock(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), (B, L, d) in and out, with GELU.

    Args:
        width: d.
        hidden: width inside the MLP; None for 4 d.
    """

    def __init__(self, width: int, hidden: int | None = None):
        super().__init__()
        # Heads of at least 16 channels, as many as divide the width.
        self.heads = max(h for h in range(1, max(1, width // 16) + 1) if width % h == 0)
        hidden = 4 * width if hidden is None else hidden
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """Tokens and `visible(...)` -> tokens."""
        y = self.norm1(x)
        parts = (part(y).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        q, k, v = (part.transpose(1, 2) for part in parts)  # (B, heads, L, d / heads)
        mixed = attend(q, k, v, seen)  # (B, heads, L, d / heads)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Scaled dot-product attention, all of (B, heads, L, d / heads); every query sees a key. On a CPU the backward pass
    of torch's fused kernel takes several times as long in bfloat16 as plain products do (`benchmarks/attention.py`):
    there, plain products."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


def visible(tokens: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Which keys each query sees, (B or 1, 1, L or 1, L) of bool; None if all.

    A token sees itself in any case, so that a sample without valid tokens gives numbers.
    """
    length = tokens.shape[1]
    seen = None if mask is None else (mask != 0)[:, None, None]
    if causal:
        before = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()[None, None]
        seen = before if seen is None else seen & before
    if seen is None or mask is None:
        return seen
    return seen | torch.eye(length, dtype=torch.bool, device=tokens.device)
