"""Sums over the rows of an input, in single precision or better."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 1 << 17  # numbers squared together on a CPU: half a megabyte in single precision


def single(x: Tensor) -> Tensor:
    """In at least single precision."""
    return x if x.dtype == torch.float64 else x.float()


def squares(x: Tensor) -> Tensor:
    """Sum of x_j^2 over the rows of (n, in), in single precision or better.

    On a CPU in pieces that stay in a core's cache, so that no copy of the input goes to memory.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.device.type != "cpu":
        return x.to(wide).square().sum(dim=0)
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    for piece in x.split(max(1, PIECE // max(x.shape[1], 1))):
        total += piece.to(wide).square().sum(dim=0)
    return total.to(wide)


def gram(x: Tensor) -> Tensor:
    """Sum of x x^T over the rows of (n, in)."""
    x = single(x)
    return x.t() @ x
