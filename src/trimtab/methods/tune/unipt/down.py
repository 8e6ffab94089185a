"""Linear maps with a norm behind them, which keep the normalised value and not what was normalised.

A norm's affine part is not carried out: z = x * weight + bias is a `Target`, cheap to make again wherever z is needed,
while plain autograd keeps what entered the norm and, in the product that follows, what came out. Hidden maps are kept
as they came, a tower in half precision in half precision, or rounded to `kept`: results are the same to the bit, only
the gradients of the linear maps' weights see the rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab import divided


class Target(NamedTuple):
    """One layer's tokens z = x * weight + bias, the affine part not yet carried out.

    Attributes:
        x: (B, L, d).
        weight: (d,), or None where z = x.
        bias: (d,).
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    def tokens(self) -> Tensor:
        """z, (B, L, d)."""
        return self.x if self.weight is None or self.bias is None else torch.addcmul(self.bias, self.x, self.weight)

    def first(self) -> Tensor:
        """z of the first token, (B, 1, d)."""
        return Target(self.x[:, :1], *self[1:]).tokens()

    def pooled(self, mask: Tensor | None, causal: bool) -> Tensor:
        """The mean of z over valid tokens, (B, 1, d); with `causal` over those up to each token, (B, L, d)."""
        mean, count = pooled(self.x, mask, causal)
        if self.weight is None or self.bias is None:
            return mean
        # A sample without valid tokens has the mean 0, not the bias.
        return mean * self.weight + (self.bias if count is None else self.bias * count.clamp(max=1))


def pooled(x: Tensor, mask: Tensor | None, causal: bool = False) -> tuple[Tensor, Tensor | None]:
    """Mean over valid tokens (B, 1, d), or running means (B, L, d), and the counts (None if all tokens are valid)."""
    if mask is None and not causal:
        return x.mean(dim=1, keepdim=True), None
    weights = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
    if causal:
        count = weights.cumsum(dim=1)[..., None]
        return (x * weights[..., None]).cumsum(dim=1) / count.clamp(min=1), count
    count = weights.sum(dim=1)[:, None, None]
    return weights[:, None] @ x / count.clamp(min=1), count


def some(chosen: Tensor) -> Tensor | None:
    """Where a vector is not 0, unless that is nearly everywhere or not to be known: under a compiler, or of tensors
    without values."""
    if torch.compiler.is_compiling() or isinstance(chosen, FakeTensor):
        return None
    where = chosen.nonzero()[:, 0]
    return where if 8 * len(where) <= 7 * len(chosen) else None  # taking them costs a copy


def narrow(maps: Tensor, kept: torch.dtype | None) -> Tensor:
    """What is kept of hidden maps: in `kept` if that is narrower."""
    return maps if kept is None or kept.itemsize >= maps.dtype.itemsize else maps.to(kept)


class _Down(torch.autograd.Function):
    """normalise(W h + b) over the last axis, eps as LayerNorm's; keeps h, the result and one number a token."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, eps: float, kept: torch.dtype | None,
                where: Tensor | None) -> Tensor:  # fmt: skip
        rows = maps.flatten(0, -2)
        rows = rows if where is None else rows.index_select(0, where)
        y = F.linear(rows.to(weight.dtype), weight, bias)
        x, _, rstd = torch.native_layer_norm(y, (y.shape[-1],), None, None, eps)
        x = spread(x, where, maps.shape[:-1])
        ctx.save_for_backward(narrow(rows, kept), weight, x, rstd, where)
        ctx.dtype = maps.dtype
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, x, rstd, where = ctx.saved_tensors
        grad, flat = (t.flatten(0, -2) if where is None else t.flatten(0, -2).index_select(0, where) for t in (grad, x))
        d_y = _layer_norm_backward(grad, flat, rstd).to(weight.dtype)  # (B L or the valid, d)
        d_weight = d_y.T @ rows.to(weight.dtype)
        d_maps = spread((d_y @ weight).to(ctx.dtype), where, x.shape[:-1]) if ctx.needs_input_grad[0] else None
        return d_maps, d_weight, d_y.sum(dim=0), None, None, None


def spread(rows: Tensor, where: Tensor | None, shape: torch.Size) -> Tensor:
    """Rows (n, d) at some places, or all, of (*shape, d); the others are 0."""
    if where is not None:
        rows = rows.new_zeros(shape.numel(), rows.shape[1]).index_copy(0, where, rows)
    return rows.view(*shape, rows.shape[1])


def _layer_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of what was normalised to x, (..., d)."""
    grad, x, rstd = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (grad, x, rstd))
    # torch's kernel wants what was normalised, its mean and its scale: x itself has the mean 0 and the scale 1.
    d_x = torch.ops.aten.native_layer_norm_backward(
        grad, x, (x.shape[-1],), torch.zeros_like(rstd), torch.ones_like(rstd), None, None, [True, False, False]
    )[0]
    return d_x.mul_(rstd)


def down(sequence: Any, maps: Tensor, kept: torch.dtype | None = None,
         where: Tensor | None = None) -> Target:  # fmt: skip
    """A linear map and its LayerNorm, (..., D) -> (..., d).

    Args:
        sequence: the two.
        maps: (..., D), (B, L, D) mostly.
        kept: the precision in which the maps are kept.
        where: the tokens that count, of all; x of the others is 0. None: all do.
    """
    linear, norm = sequence
    return Target(_Down.apply(maps, linear.weight, linear.bias, norm.eps, kept, where), norm.weight, norm.bias)


class _DownTwice(torch.autograd.Function):
    """normalise(W2 relu(W1 m + b1) + b2); the hidden layer, which is wide, is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, merged: Tensor, wide: Tensor, wide_bias: Tensor, weight: Tensor, bias: Tensor,
                eps: float) -> Tensor:  # fmt: skip
        y = F.linear(F.linear(merged, wide, wide_bias).relu_(), weight, bias)
        x, _, rstd = torch.native_layer_norm(y, (y.shape[-1],), None, None, eps)
        ctx.save_for_backward(merged, wide, wide_bias, weight, x, rstd)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        merged, wide, wide_bias, weight, x, rstd = ctx.saved_tensors
        d_y = _layer_norm_backward(grad, x, rstd).to(weight.dtype).flatten(0, -2)  # (B L, d)
        rows = merged.flatten(0, -2).to(wide.dtype)
        hidden = F.linear(rows, wide, wide_bias).relu_()  # (B L, D)
        d_hidden = torch.ops.aten.threshold_backward(d_y @ weight, hidden, 0)
        d_merged = (d_hidden @ wide).view_as(merged).to(merged.dtype)
        return d_merged, d_hidden.T @ rows, d_hidden.sum(dim=0), d_y.T @ hidden, d_y.sum(dim=0), None


def project(sequence: Any, merged: Tensor) -> Target:
    """One linear map and its norm, or two with a ReLU between and a norm: (..., d) -> (..., d)."""
    if len(sequence) == 2:
        return down(sequence, merged)
    wide, _, linear, norm = sequence
    x = _DownTwice.apply(merged, wide.weight, wide.bias, linear.weight, linear.bias, norm.eps)
    return Target(x, norm.weight, norm.bias)


def normalise(y: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """(y - mean) * rstd a channel, (B, L, d), and rstd, (d,), as BatchNorm has them; its running statistics go on."""
    if norm.training and divided.parts() > 1:
        return divided.standardised(y, norm)
    if norm.training:
        norm.num_batches_tracked += 1
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    rows = y.flatten(0, -2).to(norm.running_mean.dtype)
    x, _, rstd = torch.native_batch_norm(
        rows, None, None, norm.running_mean, norm.running_var, norm.training, share, norm.eps
    )
    return x.view_as(y), rstd if norm.training else torch.rsqrt(norm.running_var + norm.eps)


def batch_slope(grad: Tensor, x: Tensor, rstd: Tensor, training: bool) -> Tensor:
    """The gradient of what `normalise` made x of, from that of x, as rows (B L, d)."""
    d_x = grad.flatten(0, -2)
    if training and divided.parts() > 1:
        d_x = divided.standardised_slope(d_x, x.flatten(0, -2))
    elif training:  # torch's kernel wants what was normalised, its mean and its scale: x has the mean 0 and the scale 1
        moments = torch.zeros_like(rstd), torch.ones_like(rstd)
        d_x = torch.ops.aten.native_batch_norm_backward(
            d_x, x.flatten(0, -2), None, None, None, *moments, True, 0.0, [True, False, False]
        )[0]
    return d_x * rstd


class _DownBatch(torch.autograd.Function):
    """normalise(W h + b) over samples and tokens, as BatchNorm does; keeps h, the result and one number a channel."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d,
                kept: torch.dtype | None) -> Tensor:  # fmt: skip
        x, rstd = normalise(F.linear(maps, weight, bias), norm)
        ctx.save_for_backward(narrow(maps, kept), weight, x, rstd)
        ctx.training, ctx.dtype = norm.training, maps.dtype
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, x, rstd = ctx.saved_tensors
        d_y = batch_slope(grad, x, rstd, ctx.training).to(weight.dtype)
        d_maps = (d_y @ weight).view_as(maps).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return d_maps, d_y.T @ maps.flatten(0, -2).to(weight.dtype), d_y.sum(dim=0), None, None


def down_grid(sequence: Any, tokens: Tensor, kept: torch.dtype | None = None) -> Target:
    """A 1x1 convolution and its BatchNorm on a grid's cells as tokens, (B, L, C) -> (B, L, d).

    The same products as of a convolution over (B, C, n, m), which torch computes at half the speed on one CPU thread.
    """
    conv, norm = sequence
    x = _DownBatch.apply(tokens, conv.weight.flatten(1), conv.bias, norm, kept)
    return Target(x, norm.weight, norm.bias)
