"""Booleans as bits, eight to a byte, the first in the lowest bit: how masks are stored in runs and in sparse files."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class Bits(NamedTuple):
    """A mask in memory, a bit a number.

    Attributes:
        packed: as `pack` makes it, on the CPU.
        shape: of the mask.
    """

    packed: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, mask: Tensor) -> Bits:
        return cls(pack(mask), mask.shape)

    @property
    def mask(self) -> Tensor:
        """The mask itself, made anew."""
        return unpack(self.packed, self.shape)

    @property
    def kept(self) -> int:
        """How many are True; all, where costs are estimated and the mask has no values."""
        if isinstance(self.packed, FakeTensor):
            return self.shape.numel()
        return int(_ONES[self.packed.numpy()].sum())


_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


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
