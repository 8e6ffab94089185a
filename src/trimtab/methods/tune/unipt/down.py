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
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


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
        return self.x if self.weight is None else torch.addcmul(self.bias, self.x, self.weight)

    def pooled(self, mask: Tensor | None, causal: bool) -> Tensor:
        """The mean of z over valid tokens, (B, 1, d); with `causal` over those up to each token, (B, L, d)."""
        mean, count = pooled(self.x, mask, causal)
        if self.weight is None:
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


def narrow(maps: Tensor, kept: torch.dtype | None) -> Tensor:
    """What is kept of hidden maps: in `kept` if that is narrower."""
    return maps if kept is None or kept.itemsize >= maps.dtype.itemsize else maps.to(kept)


class _Down(torch.autograd.Function):
    """normalise(W h + b) over the last axis, eps as LayerNorm's; keeps h, the result and one number a token."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, eps: float, kept: torch.dtype | None) -> Tensor:
        y = F.linear(maps.to(weight.dtype), weight, bias)
        x, _, rstd = torch.native_layer_norm(y, (y.shape[-1],), None, None, eps)
        ctx.save_for_backward(narrow(maps, kept), weight, x, rstd)
        ctx.dtype = maps.dtype
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, x, rstd = ctx.saved_tensors
        d_y = _layer_norm_backward(grad, x, rstd).to(weight.dtype)
        rows = d_y.flatten(0, -2)  # (B L, d)
        d_weight = rows.T @ maps.flatten(0, -2).to(weight.dtype)
        d_maps = (d_y @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return d_maps, d_weight, rows.sum(dim=0), None, None


def _layer_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """The gradient of what was normalised to x, (..., d)."""
    grad, x, rstd = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (grad, x, rstd))
    # torch's kernel wants what was normalised, its mean and its scale: x itself has the mean 0 and the scale 1.
    d_x = torch.ops.aten.native_layer_norm_backward(
        grad, x, (x.shape[-1],), torch.zeros_like(rstd), torch.ones_like(rstd), None, None, [True, False, False]
    )[0]
    return d_x.mul_(rstd)


def down(sequence: nn.Sequential, maps: Tensor, kept: torch.dtype | None = None) -> Target:
    """A linear map and its LayerNorm, (B, L, D) -> (B, L, d); `kept` is the precision in which the maps are kept."""
    linear, norm = sequence
    return Target(_Down.apply(maps, linear.weight, linear.bias, norm.eps, kept), norm.weight, norm.bias)


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


def project(sequence: nn.Sequential, merged: Tensor) -> Target:
    """One linear map and its norm, or two with a ReLU between and a norm: (B, L, d) -> (B, L, d)."""
    if len(sequence) == 2:
        return down(sequence, merged)
    wide, _, linear, norm = sequence
    x = _DownTwice.apply(merged, wide.weight, wide.bias, linear.weight, linear.bias, norm.eps)
    return Target(x, norm.weight, norm.bias)


def normalise(y: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(y - mean) * rstd a channel, (B, L, d), and rstd, (d,), as BatchNorm has them; its running statistics go on."""
    if norm.training:
        norm.num_batches_tracked += 1
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    rows = y.flatten(0, -2).to(norm.running_mean.dtype)
    x, _, rstd = torch.native_batch_norm(
        rows, None, None, norm.running_mean, norm.running_var, norm.training, share, norm.eps
    )
    return x.view_as(y), rstd if norm.training else (norm.running_var + norm.eps).rsqrt()


def batch_backward(grad: Tensor, maps: Tensor, weight: Tensor, x: Tensor, rstd: Tensor, training: bool,
                   needed: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of maps (if `needed`), weight and bias of a linear map whose result was normalised to x."""
    d_y, x = grad.flatten(0, -2), x.flatten(0, -2)  # (B L, d)
    if training:
        d_y = torch.addcmul(d_y - d_y.mean(dim=0), x, (d_y * x).mean(dim=0), value=-1)
    d_y = (d_y * rstd).to(weight.dtype)
    d_maps = (d_y @ weight).view_as(maps) if needed else None
    return d_maps, d_y.T @ maps.flatten(0, -2).to(weight.dtype), d_y.sum(dim=0)


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
        d_maps, *rest = batch_backward(grad, maps, weight, x, rstd, ctx.training, ctx.needs_input_grad[0])
        return None if d_maps is None else d_maps.to(ctx.dtype), *rest, None, None


def down_grid(sequence: nn.Sequential, tokens: Tensor, kept: torch.dtype | None = None) -> Target:
    """A 1x1 convolution and its BatchNorm on a grid's cells as tokens, (B, L, C) -> (B, L, d).

    The same products as of a convolution over (B, C, n, m), which torch computes at half the speed on one CPU thread.
    """
    conv, norm = sequence
    x = _DownBatch.apply(tokens, conv.weight.flatten(1), conv.bias, norm, kept)
    return Target(x, norm.weight, norm.bias)
