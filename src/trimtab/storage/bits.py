"""Booleans as bits, eight to a byte, the first in the lowest bit: how masks are stored in runs and in sparse files."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def pack(mask: Tensor) -> Tensor:
    """A boolean mask as bits, eight to a byte, uint8 of shape (ceil(n / 8),); what fills the last byte is 0."""
    if isinstance(mask, FakeTensor):  # with which costs are estimated: it has no values
        return torch.empty(-(-mask.numel() // 8), dtype=torch.uint8)
    return torch.from_numpy(np.packbits(mask.flatten().bool().cpu().numpy(), bitorder="little"))


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack` for a tensor of that shape; ValueError if the number of bytes does not fit it."""
    if len(packed) != -(-shape.numel() // 8):
        raise ValueError(f"a mask of shape {tuple(shape)} takes {-(-shape.numel() // 8)} bytes, found {len(packed)}")
    if isinstance(packed, FakeTensor):
        return torch.empty(shape, dtype=torch.bool)
    bits = np.unpackbits(packed.cpu().numpy(), bitorder="little", count=shape.numel())
    return torch.from_numpy(bits.view(bool)).view(shape)
