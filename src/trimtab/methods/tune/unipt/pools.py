"""How frozen maps are read as they are: one query on a tower's tokens, and cells of a grid by a guide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.methods.tune.unipt.core import CACHE_BYTES, OTHER_BYTES
from trimtab.methods.tune.unipt.down import Target, batch_slope, narrow, normalise, pooled, some


class _Read(torch.autograd.Function):
    """A single query on u = relu(h), (B, L, D). Gives the attended sum (B, D), the sum of its shares (B,) and the mean
    of u over valid tokens (B, D), which has no gradient.

    Tokens whose score is not positive have no share and no slope, so that only the others are kept, beside the scores.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, key: Tensor, offset: Tensor, mask: Tensor | None, eps: float,
                kept: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with torch.autocast(maps.device.type, enabled=False):  # bound by memory, not by products
            u = F.relu(maps.to(key.dtype))
            scores = _along(key, u) + offset[:, None]
            scores = F.relu(scores if mask is None else scores * mask)  # (B, L)
            norm = scores.sum(dim=-1, keepdim=True).clamp(min=eps)
            shares = scores / norm
            attended = torch.bmm(shares[:, None], u)[:, 0]
            mean = pooled(u, mask)[0][:, 0]
        where = some(scores.flatten())
        rows = maps.flatten(0, 1)
        ctx.save_for_backward(narrow(rows if where is None else rows.index_select(0, where), kept), where, scores, mask)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean)
        return attended, shares.sum(dim=-1), mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor, d_amount: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        rows, where, scores, mask = ctx.saved_tensors
        u = F.relu(rows.to(scores.dtype))
        if where is not None:
            u = u.new_zeros(scores.numel(), u.shape[1]).index_copy_(0, where, u)
        u = u.view(*scores.shape, -1)
        norm = scores.sum(dim=-1, keepdim=True).clamp(min=ctx.eps)
        d_shares = _along(d_sum.to(u.dtype), u) + d_amount[:, None]
        along = (d_shares * scores).sum(dim=-1, keepdim=True) / norm**2
        d_scores = d_shares / norm - along * (norm > ctx.eps)  # the guard has no slope
        d_scores = d_scores * (scores > 0)
        if mask is not None:
            d_scores = d_scores * mask
        return None, torch.bmm(d_scores[:, None], u)[:, 0], d_scores.sum(dim=-1), None, None, None


def _along(vector: Tensor, u: Tensor) -> Tensor:
    """Products of a vector a sample (B, D) with its tokens (B, L, D): (B, L). With the vector as the left factor, which
    takes a tenth of the time on one CPU thread."""
    return torch.bmm(vector[:, None], u.transpose(1, 2))[:, 0]


def read_vector(maps: Tensor, key: Tensor, offset: Tensor, mask: Tensor | None, eps: float,
                kept: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ReLU attention of one query a sample on relu(maps), rows of unit L1 norm, the norm at least `eps`.

    Args:
        maps: (B, L, D), frozen.
        key: (B, D); a token's score is key . relu(h) + offset.
        offset: (B,).
        mask: (B, L), 1 = valid.
        eps: smallest norm.
        kept: precision in which maps are kept for the backward pass; None for their own.

    Returns:
        The attended sum (B, D), the sum of its weights (B,), and the mean of relu(maps) over valid tokens (B, D).
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    return _Read.apply(maps, key.to(dtype), offset.to(dtype), mask, eps, kept)


class _GuidedDown(torch.autograd.Function):
    """Cells of a frozen grid, pooled by how well they fit a guide, through a linear map and BatchNorm.

    s = sum over channels of relu(guide) * grid; w = relu(s) / (cell sum + eps) + 1 / r^2; cell sums of w * grid. Keeps
    the grid, the guide's signs, the weights and what `normalise` gives; the pooled cells are made again, unless they
    are few beside the grid.
    """

    @staticmethod
    def forward(ctx: Any, guide: Tensor, grid: Tensor, columns: int, eps: float, weight: Tensor, bias: Tensor,
                norm: nn.BatchNorm2d, kept: torch.dtype | None) -> Tensor:  # fmt: skip
        rate, values = grid.shape[-1] // columns, grid.to(guide.dtype)
        with torch.autocast(grid.device.type, enabled=False):  # bound by memory, not by products
            share = _per_position(F.relu(guide), values, columns).relu_()
            total = _cells(share, rate) + eps  # (B, n, m)
            shares = share / _spread(total, rate)
            cells = _per_cell(shares + 1 / rate**2, values, columns)
        x, rstd = normalise(F.linear(cells, weight, bias), norm)
        few = cells if rate >= 8 else None
        ctx.save_for_backward(guide > 0, narrow(grid, kept), shares, total, weight, x, rstd, few)
        ctx.training = norm.training
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        positive, grid, shares, total, weight, x, rstd, cells = ctx.saved_tensors
        rate, columns = grid.shape[-1] // total.shape[-1], total.shape[-1]
        d_y = batch_slope(grad, x, rstd, ctx.training).to(weight.dtype)
        d_shares = _per_position((d_y @ weight).view(*x.shape[:2], -1), grid, columns)
        d_share = (d_shares - _spread(_cells(d_shares * shares, rate), rate)) / _spread(total, rate)
        d_guide = _per_cell(d_share * (shares > 0), grid, columns) * positive
        cells = _per_cell(shares + 1 / rate**2, grid, columns) if cells is None else cells
        return d_guide, None, None, None, d_y.T @ cells.flatten(0, 1), d_y.sum(dim=0), None, None


def guided_down(sequence: Any, guide: Tensor, grid: Tensor, columns: int, eps: float,
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
    weight = conv.weight.flatten(1)
    x = _GuidedDown.apply(guide.to(weight.dtype), grid, columns, eps, weight, conv.bias, norm, kept)
    return Target(x, norm.weight, norm.bias)


def _spread(x: Tensor, rate: int) -> Tensor:
    """(..., n, n) -> (..., rn, rn), every value r x r times."""
    return x.repeat_interleave(rate, dim=-2).repeat_interleave(rate, dim=-1)


def _cells(x: Tensor, rate: int) -> Tensor:
    """Sums of r x r cells, (B, rn, rn) -> (B, n, n)."""
    return F.avg_pool2d(x[:, None], rate, divisor_override=1)[:, 0]


# A sum over a position's channels, or over a cell's positions, is part of a product for its row of cells: (m, C) with
# (C, r rm), or (m, r rm) with (r rm, C), where only what a column has to do with its own cell counts. m times the
# multiply-adds, but a processor makes products faster than it reads a grid.


def _per_position(guide: Tensor, grid: Tensor, columns: int) -> Tensor:
    """Sum over channels of the grid (B, C, rn, rm) times a guide of its cells (B, n m, C): (B, rn, rm)."""
    rate, guide = grid.shape[-1] // columns, guide.unflatten(1, (-1, columns))
    out = guide.new_empty(*guide.shape[:2], rate, columns, rate)
    for where, positions in _rows(grid, rate):
        every = torch.bmm(guide[where], positions.to(guide.dtype))  # (b, m, r rm)
        own = every.unflatten(2, (rate, columns, rate)).diagonal(dim1=1, dim2=3)  # (b, r, r, m)
        out[where] = own.transpose(2, 3)
    return out.flatten(3, 4).flatten(1, 2)


def _per_cell(weights: Tensor, grid: Tensor, columns: int) -> Tensor:
    """Cell sums of weights (B, rn, rm) times the grid (B, C, rn, rm), as tokens (B, n m, C)."""
    rate = grid.shape[-1] // columns
    weights = weights.unflatten(2, (columns, rate)).unflatten(1, (-1, rate))  # (B, n, r, m, r)
    out = weights.new_empty(*weights.shape[:2], columns, grid.shape[1])
    for where, positions in _rows(grid, rate):
        own = weights[where]  # (b, r, m, r)
        every = own.new_zeros(len(own), columns, rate, columns, rate)
        every.diagonal(dim1=1, dim2=3).copy_(own.transpose(2, 3))
        out[where] = torch.bmm(every.flatten(2), positions.to(own.dtype).transpose(1, 2))
    return out.flatten(1, 2)


def _rows(grid: Tensor, rate: int) -> Iterator[tuple[Any, Tensor]]:
    """Rows of cells of a grid (B, C, rn, rm), some at a time: which, as an index of (B, n), and their positions,
    (b, C, r rm). All of one large sample, or the same one of as many small samples as stay in the cache."""
    limit = CACHE_BYTES.get(grid.device.type, OTHER_BYTES)
    if grid[0].numel() * 4 > limit:
        for i, sample in enumerate(grid):
            yield (i, slice(None)), sample.unflatten(1, (-1, rate)).flatten(2).transpose(0, 1)
        return
    size = max(1, 4 * limit // (4 * grid.shape[1] * rate * grid.shape[3]))
    for start in range(0, len(grid), size):
        for row in range(grid.shape[2] // rate):
            here = grid[start : start + size, :, row * rate : (row + 1) * rate]
            yield (slice(start, start + size), row), here.flatten(2)
