"""Pooling of many vectors into one by a learned operator."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from trimtab.recurrence import both_ways

PADDING = -10000  # smaller than any value that a model gives


class Lengths(NamedTuple):
    """Samples by their numbers of valid tokens.

    Attributes:
        places: of the valid tokens, in a batch's tokens one behind the other, (N,): sample after sample, shorter ones
            first.
        parts: how many samples have how many valid tokens, from the fewest.
        back: where in this order each sample is, (B,).
    """

    places: Tensor
    parts: list[tuple[int, int]]
    back: Tensor


def lengths_of(valid: Tensor) -> Lengths | None:
    """The lengths in a mask (B, L). None where they are not to be known: under a compiler, of tensors without values,
    of no samples, and on a GPU, which would have to be waited for."""
    if valid.device.type != "cpu" or not len(valid) or torch.compiler.is_compiling() or isinstance(valid, FakeTensor):
        return None
    counts, order = valid.sum(dim=1).sort(stable=True)
    places = torch.arange(valid.numel()).view_as(valid)[order]
    found = zip(*(x.tolist() for x in counts.unique_consecutive(return_counts=True)), strict=True)
    return Lengths(places[valid[order]], [(samples, length) for length, samples in found], order.argsort())


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
        """Weights of the largest, the second largest and so on, (B, size, 1), or (1, size, 1) if all tokens are valid;
        zero beyond a sample's number of valid tokens."""
        if valid is None:
            return self._weights(size, None)[..., None]
        count = valid.sum(dim=1)  # (B,)
        if size > len(count):
            return self._weights(size, count)[..., None]
        every = self._weights(size, torch.arange(size + 1, device=valid.device))  # fewer than samples
        return every[count][..., None]

    def _weights(self, size: int, lengths: Tensor | None) -> Tensor:
        """Of samples of these lengths, (lengths, size); None: of one of `size`, (1, size)."""
        positions = self._positions(size)  # (L, 32)
        if lengths is None:
            forth, back = both_ways(self.gru, positions[None])
            return torch.softmax(self.linear((forth + back) / 2)[..., 0] / 0.1, dim=1)
        # Backwards the GRU starts at the last valid token: for that the padding is moved in front, and back again.
        # Packed sequences would do the same, but need the lengths as numbers: a wait for the GPU.
        places, shift = torch.arange(size, device=lengths.device), size - lengths[:, None]
        there = places < lengths[:, None]  # (lengths, L)
        padded = positions * there[..., None]
        moved = padded.gather(1, _all((places - shift) % size, padded))
        forth, back = both_ways(self.gru, torch.cat([positions[None], moved]))
        back = back[1:].gather(1, _all((places + shift) % size, back[1:]))
        scores = self.linear((forth[:1] + back) / 2)[..., 0].masked_fill(~there, PADDING)
        return torch.softmax(scores / 0.1, dim=1).masked_fill(~there, 0)

    def _positions(self, size: int) -> Tensor:
        """Sines and cosines, interleaved, (size, 32)."""
        device, width = self.linear.weight.device, self.gru.input_size
        rates = torch.exp(torch.arange(0, width, 2, device=device).float() * -(math.log(10000.0) / width))
        angles = torch.arange(size, device=device).float()[:, None] * rates
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(self.linear.weight.dtype)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Tokens (B, L, D) and which are valid, (B, L), at any places -> (B, D); None: all are. A sample without valid
        tokens gives zeros."""
        if valid is not None and (lengths := lengths_of(valid)):
            return self.of_lengths(x.flatten(0, 1).index_select(0, lengths.places), lengths)
        weights = self.weights(x.shape[1], valid)
        if valid is not None:
            x = x.masked_fill(~valid[..., None], PADDING)  # it is sorted to the end, where the weights are 0
        return _WeightedBySize.apply(x.transpose(1, 2), weights[..., 0])

    def of_lengths(self, rows: Tensor, lengths: Lengths) -> Tensor:
        """The valid tokens alone, (N, D), in the order of `lengths` -> (B, D)."""
        parts, pooled = lengths.parts, []
        weights = self._weights(max(1, parts[-1][1]), torch.tensor([length for _, length in parts]))
        split = rows.split([samples * length for samples, length in parts])
        for (samples, length), part, own in zip(parts, split, weights, strict=True):
            x = part.view(samples, length, -1).transpose(1, 2) if length else part.new_zeros(samples, rows.shape[1], 0)
            pooled.append(_WeightedBySize.apply(x, own[None, :length]))
        return torch.cat(pooled).index_select(0, lengths.back)


class _WeightedBySize(torch.autograd.Function):
    """Sums over each channel's values (B, D, L), sorted from the largest, times weights (B or 1, L): (B, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        x = x.contiguous()  # sorting along memory takes two thirds of the time
        order = descending(x)
        values = x.gather(2, order)
        ctx.save_for_backward(order, values, weights)
        return (values * weights[:, None]).sum(dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        order, values, weights = ctx.saved_tensors
        d_weights = torch.bmm(grad[:, None], values.to(grad.dtype))[:, 0]
        d_weights = d_weights if len(weights) == len(values) else d_weights.sum(dim=0, keepdim=True)
        d_values = (grad[..., None] * weights[:, None]).to(values.dtype)
        return torch.empty_like(values).scatter_(2, order, d_values), d_weights.to(weights.dtype)


@torch.library.custom_op("trimtab::descending", mutates_args=())
def descending(x: Tensor) -> Tensor:
    """The order of the values on the last axis, from the largest to the smallest, as indices."""
    # On few CPU threads numpy's sort takes a third to two thirds of the time of torch's.
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.get_num_threads() < 4:
        return torch.from_numpy(np.argsort(-x.numpy(), axis=-1))
    return x.argsort(dim=-1, descending=True)


@descending.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int64)


def size_augmented(tokens: Tensor, most: float = 0.2) -> Tensor:
    """Which of the tokens (B, L, D) stay in a training step, (B, L): in four of five samples each goes with a chance
    that is drawn for the sample, up to `most` (VSE-infinity's size augmentation, section 5.1, as its authors coded it).
    """
    rate = torch.rand(len(tokens), 1, device=tokens.device)
    return (rate <= 0.2) | (torch.rand(tokens.shape[:2], device=tokens.device) > most * rate)


def _all(rows: Tensor, like: Tensor) -> Tensor:
    """Rows (B, L) as indices of all channels for `gather`, (B, L, D)."""
    return rows[..., None].expand_as(like)
