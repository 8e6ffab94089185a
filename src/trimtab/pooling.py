"""Pooling of many vectors into one by a learned operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GPO(nn.Module):
    """Generalised pooling operator (VSE-infinity: Chen et al., CVPR 2021, section 4): a learned weighting of each
    channel's values sorted by size.

    The weights come from a GRU over positions and depend on nothing but the number of valid tokens.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(width, 1, bias=False)

    def weights(self, size: int, valid: Tensor | None) -> Tensor:
        """Pooling weights, (B, size, 1), or (1, size, 1) if all tokens are valid; zero at padding."""
        positions = self._positions(size)[None]  # (1, L, 32)
        if valid is None:
            forth, back = self.gru(positions)[0].chunk(2, dim=-1)
        else:
            # Backwards the GRU starts at the last valid token: for that the padding is moved in front, and back again.
            # Packed sequences would do the same, but need the lengths as numbers: a wait for the GPU.
            shift = size - valid.sum(dim=1, keepdim=True)  # (B, 1)
            places = torch.arange(size, device=valid.device)
            padded = positions * valid[..., None]
            moved = padded.gather(1, _all(places - shift, size, padded))
            forth, back = self.gru(torch.cat([positions, moved]))[0].chunk(2, dim=-1)
            forth, back = forth[:1], back[1:].gather(1, _all(places + shift, size, back[1:]))
        scores = self.linear((forth + back) / 2)  # (B, L, 1)
        if valid is not None:
            scores = scores.masked_fill(~valid[..., None], -10000)
        return torch.softmax(scores / 0.1, dim=1)

    def _positions(self, size: int) -> Tensor:
        """Sines and cosines, interleaved, (size, 32)."""
        device, width = self.linear.weight.device, self.gru.input_size
        rates = torch.exp(torch.arange(0, width, 2, device=device).float() * -(math.log(10000.0) / width))
        angles = torch.arange(size, device=device).float()[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(self.linear.weight.dtype)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Tokens (B, L, D) and which are valid, (B, L) -> (B, D); None: all are."""
        weights = self.weights(x.shape[1], valid)
        if valid is not None:
            x = x.masked_fill(~valid[..., None], -10000)
        x = x.transpose(1, 2).contiguous()  # sorting along memory takes two thirds of the time
        x = x.sort(dim=2, descending=True).values.transpose(1, 2)
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)  # padding was sorted to the end
        return (x * weights).sum(dim=1)


def _all(rows: Tensor, size: int, like: Tensor) -> Tensor:
    """Rows (B, L), counted round and round, as indices of all channels for `gather`, (B, L, D)."""
    return (rows % size)[..., None].expand_as(like)
