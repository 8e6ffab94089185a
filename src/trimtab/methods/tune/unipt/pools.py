"""How frozen maps are read as they are: one query on a tower's tokens, and cells of a grid by a guide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.methods.tune.unipt.core import CACHE_BYTES, OTHER_BYTES
from trimtab.methods.tune.unipt.down import Target, batch_backward, narrow, normalise


class _Read(torch.autograd.Function):
    """A single query on u = relu(h), (B, L, D). Gives the attended sum (B, D) and the sum of its shares (B,).

    Tokens whose score is not positive have no share and no slope, so that only the others are kept, beside the scores.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, key: Tensor, offset: Tensor, mask: Tensor | None, eps: float,
                kept: torch.dtype | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        with torch.autocast(maps.device.type, enabled=False):  # bound by memory, not by products
            u = F.relu(maps.to(key.dtype))
            scores = torch.bmm(u, key[..., None])[..., 0] + offset[:, None]
            scores = F.relu(scores if mask is None else scores * mask)  # (B, L)
            norm = scores.sum(dim=-1, keepdim=True).clamp(min=eps)
            shares = scores / norm
            attended = torch.bmm(shares[:, None], u)[:, 0]
        # Neither a compiler nor an estimate on fake tensors knows how many there are: they keep all.
        unknown = torch.compiler.is_compiling() or isinstance(scores, FakeTensor)
        where = None if unknown else scores.flatten().nonzero()[:, 0]
        rows = maps.flatten(0, 1)
        ctx.save_for_backward(narrow(rows if where is None else rows[where], kept), where, scores, mask)
        ctx.eps = eps
        return attended, shares.sum(dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor, d_amount: Tensor) -> tuple[Tensor | None, ...]:
        rows, where, scores, mask = ctx.saved_tensors
        u = F.relu(rows.to(scores.dtype))
        if where is not None:
            u = u.new_zeros(scores.numel(), u.shape[1]).index_copy_(0, where, u)
        u = u.view(*scores.shape, -1)
        norm = scores.sum(dim=-1, keepdim=True).clamp(min=ctx.eps)
        d_shares = torch.bmm(u, d_sum[..., None].to(u.dtype))[..., 0] + d_amount[:, None]
        along = (d_shares * scores).sum(dim=-1, keepdim=True) / norm**2
        d_scores = d_shares / norm - along * (norm > ctx.eps)  # the guard has no slope
        d_scores = d_scores * (scores > 0)
        if mask is not None:
            d_scores = d_scores * mask
        return None, torch.bmm(d_scores[:, None], u)[:, 0], d_scores.sum(dim=-1), None, None, None


def read_vector(maps: Tensor, key: Tensor, offset: Tensor, mask: Tensor | None, eps: float,
                kept: torch.dtype | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ReLU attention of one query a sample on relu(maps), rows of unit L1 norm, the norm at least `eps`.

    Args:
        maps: (B, L, D), frozen.
        key: (B, D); a token's score is key . relu(h) + offset.
        offset: (B,).
        mask: (B, L), 1 = valid.
        eps: smallest norm.
        kept: precision in which maps are kept for the backward pass; None for their own.

    Returns:
        The attended sum (B, D), and the sum of its weights (B,).
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    return _Read.apply(maps, key.to(dtype), offset.to(dtype), mask, eps, kept)


class _GuidedDown(torch.autograd.Function):
    """Cells of a frozen grid, pooled by how well they fit a guide, through a linear map and BatchNorm.

    s = sum over channels of relu(guide) * grid; w = relu(s) / (cell sum + eps) + 1 / r^2; cell sums of w * grid. Keeps
    the grid, the guide's signs, the weights and what `normalise` gives; the pooled cells are made again.
    """

    @staticmethod
    def forward(ctx: Any, guide: Tensor, grid: Tensor, columns: int, eps: float, weight: Tensor, bias: Tensor,
                norm: nn.BatchNorm2d, kept: torch.dtype | None) -> Tensor:  # fmt: skip
        rate = grid.shape[-1] // columns
        share = _per_position(F.relu(_grid(guide, columns)), grid).relu_()
        total = _cells(share, rate) + eps  # (B, n, m)
        shares = share / _spread(total, rate)
        pooled = _tokens(_per_cell(shares + 1 / rate**2, grid, rate))
        x, rstd = normalise(F.linear(pooled, weight, bias), norm)
        ctx.save_for_backward(guide > 0, narrow(grid, kept), shares, total, weight, x, rstd)
        ctx.training = norm.training
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        positive, grid, shares, total, weight, x, rstd = ctx.saved_tensors
        rate, columns = grid.shape[-1] // total.shape[-1], total.shape[-1]
        pooled = _tokens(_per_cell(shares + 1 / rate**2, grid, rate))
        d_pooled, d_weight, d_bias = batch_backward(grad, pooled, weight, x, rstd, ctx.training)
        d_shares = _per_position(_grid(d_pooled, columns), grid)
        d_share = (d_shares - _spread(_cells(d_shares * shares, rate), rate)) / _spread(total, rate)
        d_guide = _tokens(_per_cell(d_share * (shares > 0), grid, rate)) * positive
        return d_guide, None, None, None, d_weight, d_bias, None, None


def guided_down(sequence: nn.Sequential, guide: Tensor, grid: Tensor, columns: int, eps: float,
                kept: torch.dtype | None = None) -> Target:  # fmt: skip
    """A frozen grid shrunk to its guide's size, then `down_grid`; see `_GuidedDown`. The grid gets no gradient.

    Args:
        sequence: 1x1 convolution C -> d and its BatchNorm.
        guide: cells of the last grid as tokens, before the ReLU, (B, n m, C).
        grid: (B, C, r n, r m).
        columns: m.
        eps: added to the cells' sums.
        kept: precision in which the grid is kept for the backward pass; None for its own.

    Returns:
        (B, n m, d).
    """
    conv, norm = sequence
    x = _GuidedDown.apply(guide.to(grid.dtype), grid, columns, eps, conv.weight.flatten(1), conv.bias, norm, kept)
    return Target(x, norm.weight, norm.bias)


def _grid(tokens: Tensor, columns: int) -> Tensor:
    """(B, n m, C) -> (B, C, n, m)."""
    return tokens.transpose(1, 2).unflatten(2, (-1, columns))


def _tokens(grid: Tensor) -> Tensor:
    """(B, C, n, m) -> (B, n m, C), contiguous."""
    return grid.flatten(2).transpose(1, 2).contiguous()


def _spread(x: Tensor, rate: int) -> Tensor:
    """(..., n, n) -> (..., rn, rn), every value r x r times."""
    return x.repeat_interleave(rate, dim=-2).repeat_interleave(rate, dim=-1)


def _cells(x: Tensor, rate: int) -> Tensor:
    """Sums of r x r cells, (B, rn, rn) -> (B, n, n)."""
    return F.avg_pool2d(x[:, None], rate, divisor_override=1)[:, 0]


def _chunks(grid: Tensor) -> list[slice]:
    """Channels of one sample that fit into the cache. All where tensors are fake: counting is quicker."""
    if isinstance(grid, FakeTensor):
        return [slice(None)]
    size = max(1, CACHE_BYTES.get(grid.device.type, OTHER_BYTES) // (4 * grid[0, 0].numel() * grid.element_size()))
    return [slice(start, start + size) for start in range(0, grid.shape[1], size)]


def _per_position(guide: Tensor, grid: Tensor) -> Tensor:
    """Sum over channels of the spread guide (B, C, n, m) times the grid (B, C, rn, rm): (B, rn, rm)."""
    b, _, n, m = guide.shape
    rate = grid.shape[-1] // m
    out = grid.new_zeros(b, n, rate, m * rate)
    wide = guide.repeat_interleave(rate, dim=-1)[:, :, :, None]  # (B, C, n, 1, rm)
    for i in range(b):
        for part in _chunks(grid):
            out[i] += (grid[i, part].unflatten(1, (n, rate)) * wide[i, part]).sum(dim=0)
    return out.flatten(1, 2)


def _per_cell(weights: Tensor, grid: Tensor, rate: int) -> Tensor:
    """Cell sums of weights (B, rn, rm) times the grid: (B, C, n, m)."""
    b, c, h, w = grid.shape
    rows = grid.new_empty(b, c, h // rate, w)
    for i in range(b):
        for part in _chunks(grid):
            torch.sum((weights[i] * grid[i, part]).unflatten(1, (h // rate, rate)), dim=2, out=rows[i, part])
    return rows.unflatten(-1, (w // rate, rate)).sum(dim=-1)
