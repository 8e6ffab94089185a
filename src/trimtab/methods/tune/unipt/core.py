"""What all uses of UniPT compute: ReLU attention of an anchor on a layer's tokens, summed over layers by confidence.

    S = relu(A z^T * mask) / (row sums + eps)     (B, Q, L); no scale, no softmax, no query, key or value maps
    M = sum_l c_l (S_l z_l + z_l)                 c = softmax over layers of w . (pool A * pool z_l) + b

The published code keeps every S_l, adds an identity matrix to it and stacks all products before it weights them. Here:

* The confidences need pooled features only, so they come first, and the layers are added to one sum one by one.
* "+ identity" is `+ z_l`; dividing by the row sums comes after the product with z_l, where rows are shorter.
* S_l is computed again in the backward pass, a few samples at a time, so that it is in the processor's cache when it is
  used and is never whole in memory.
* A LayerNorm is kept as its normalised value x; z = x * weight + bias is cheap to make again, and the mean of z follows
  from the mean of x.

What autograd keeps of a layer is its input (D a token, for the weights of `down`) and x (d a token).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Scores that are looked at together: on a CPU what fits into its cache, on a GPU enough work for one launch.
_CACHE_BYTES = {"cpu": 2 << 20}
_OTHER_BYTES = 256 << 20


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


class _Down(torch.autograd.Function):
    """normalise(W h + b) over the last axis, eps as LayerNorm's; keeps h as it came, the result and one number a token.

    A tower in half precision stays so in what is kept; it is converted when it is used.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y = F.linear(maps.to(weight.dtype), weight, bias)
        x, _, rstd = torch.native_layer_norm(y, (y.shape[-1],), None, None, eps)
        ctx.save_for_backward(maps, weight, x, rstd)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, x, rstd = ctx.saved_tensors
        along = (grad * x).mean(dim=-1, keepdim=True)
        d_y = torch.addcmul(grad - grad.mean(dim=-1, keepdim=True), x, along, value=-1).mul_(rstd).to(weight.dtype)
        rows = d_y.flatten(0, -2)  # (B L, d)
        d_weight = rows.T @ maps.flatten(0, -2).to(weight.dtype)
        d_maps = (d_y @ weight).to(maps.dtype) if ctx.needs_input_grad[0] else None
        return d_maps, d_weight, rows.sum(dim=0), None


def down(sequence: nn.Sequential, maps: Tensor) -> Target:
    """A linear map and its LayerNorm, (B, L, D) -> (B, L, d)."""
    linear, norm = sequence
    return Target(_Down.apply(maps, linear.weight, linear.bias, norm.eps), norm.weight, norm.bias)


class _Attend(torch.autograd.Function):
    """c * (S z [+ z]) for one layer; keeps its inputs and, unless told to keep it, computes S again for backward."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, confidence: Tensor | None, mask: Tensor | None, eps: float, identity: bool,
                causal: bool, keep: bool, x: Tensor, weight: Tensor | None,
                bias: Tensor | None) -> Tensor:  # fmt: skip
        ctx.settings = (eps, identity, causal)
        kind = anchor.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else anchor.dtype
        parts, kept = [], []
        for part in _parts(anchor, x):
            a, z = anchor[part], Target(x[part], weight, bias).tokens()
            ratios, norm, _ = _scores(a, z, None if mask is None else mask[part], eps, causal, ctx.dtype)
            out = torch.bmm(ratios, z.to(ctx.dtype)) / norm
            out = out + z if identity else out
            parts.append(out.to(a.dtype) if confidence is None else (out * confidence[part]).to(a.dtype))
            kept += [ratios, norm] if keep else []
        ctx.save_for_backward(anchor, confidence, mask, x, weight, bias, *kept)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchor, confidence, mask, x, weight, bias, *kept = ctx.saved_tensors
        eps, identity, causal = ctx.settings
        d_anchor, d_x = torch.empty_like(anchor), torch.empty_like(x)
        d_confidence = None if confidence is None else torch.empty_like(confidence)
        d_weight, d_bias = (None, None) if weight is None else (torch.zeros_like(weight), torch.zeros_like(bias))
        for part in _parts(anchor, x):
            a, z, g = anchor[part].to(ctx.dtype), Target(x[part], weight, bias).tokens(), grad[part]
            seen = None if mask is None else mask[part]
            if kept:
                ratios, norm, keys = kept.pop(0), kept.pop(0), _keys(z, seen, ctx.dtype)
            else:
                ratios, norm, keys = _scores(a, z, seen, eps, causal, ctx.dtype)
            c = None if confidence is None else confidence[part]
            weighted = g if c is None else g * c  # gradient of O = R z / n
            scaled = (weighted / norm).to(ctx.dtype)
            # dR_ij = (dO_i . z_j - dO_i . O_i) / n_i, where R is positive.
            d_ratios = torch.bmm(scaled, z.to(ctx.dtype).transpose(1, 2))
            along = (ratios * d_ratios).sum(dim=-1, keepdim=True, dtype=z.dtype)  # dO_i . O_i
            d_ratios -= (along / norm).to(ctx.dtype)
            d_scores = torch.ops.aten.threshold_backward(d_ratios, ratios, 0)
            d_anchor[part] = torch.bmm(d_scores, keys)
            d_z = torch.bmm(d_scores.transpose(1, 2), a)
            if seen is not None:
                d_z *= seen[..., None]
            d_z = torch.baddbmm(d_z, ratios.transpose(1, 2), scaled).to(x.dtype)
            if c is not None:
                gain = along / c.clamp(min=torch.finfo(c.dtype).tiny)
                if identity:
                    gain = gain + (g * z).sum(dim=-1, keepdim=True)
                d_confidence[part] = gain.sum(dim=1, keepdim=True) if c.shape[1] == 1 else gain
            if identity:
                d_z += weighted
            if weight is None:
                d_x[part] = d_z
            else:
                d_bias += d_z.sum(dim=(0, 1))
                d_weight += (d_z * x[part]).sum(dim=(0, 1))
                torch.mul(d_z, weight, out=d_x[part])
        return d_anchor, d_confidence, None, None, None, None, None, d_x, d_weight, d_bias


def _parts(anchor: Tensor, x: Tensor) -> list[slice]:
    """Samples that are looked at together."""
    limit = _CACHE_BYTES.get(anchor.device.type, _OTHER_BYTES)
    size = max(1, limit // max(1, 4 * anchor.shape[1] * x.shape[1]))
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _scores(anchor: Tensor, z: Tensor, mask: Tensor | None, eps: float, causal: bool,
            dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """relu(A z^T * mask), (B, Q, L), its guarded row sums (B, Q, 1), and the keys, masked z, (B, L, d)."""
    keys = _keys(z, mask, dtype)
    scores = torch.bmm(anchor.to(dtype), keys.transpose(1, 2))
    if causal:
        scores = scores.tril_()
    ratios = scores.relu_()
    sums = ratios.sum(dim=-1, keepdim=True, dtype=z.dtype)
    # A row of zeros stays one whatever it is divided by; 1 / eps would be infinite in half precision.
    return ratios, torch.where(sums > 0, sums + eps, 1.0), keys


def _keys(z: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (z if mask is None else z * mask[..., None]).to(dtype)


def attend(anchor: Tensor, target: Target, mask: Tensor | None, eps: float, identity: bool = False,
           causal: bool = False, confidence: Tensor | None = None, keep: bool = False) -> Tensor:  # fmt: skip
    """ReLU attention with rows of unit L1 norm: no scale, no softmax, no query, key or value maps.

    Args:
        anchor: the queries, (B, Q, d).
        target: the keys, also the values, (B, L, d).
        mask: (B, L), 1 = valid; multiplies the scores before the ReLU, so that padding keys get weight 0.
        eps: added to the norm.
        identity: adds z_l at its own position; needs Q = L.
        causal: a token sees those up to itself.
        confidence: factor of the result, (B, 1, 1) or (B, Q, 1).
        keep: keep the scores for the backward pass instead of computing them again: faster, Q L numbers a sample more.

    Returns:
        (B, Q, d).
    """
    return _Attend.apply(anchor, confidence, mask, eps, identity, causal, keep, *target)


def confidences(anchor: Tensor, pooled_targets: list[Tensor], gate: nn.Linear) -> Tensor:
    """Softmax over layers of gate(pooled anchor * pooled target): (B, 1 or L, d) each -> (B, 1 or L, N)."""
    logits = torch.cat([gate(anchor * p) for p in pooled_targets], dim=-1)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1).to(anchor.dtype)


def merge(anchor: Tensor, targets: list[Target], mask: Tensor | None, gate: nn.Linear, eps: float,
          causal: bool = False, keep: bool = False) -> Tensor:  # fmt: skip
    """The layers' attended tokens with the identity term, summed by confidence.

    Args:
        anchor: (B, L, d).
        targets: N of them.
        mask: of the keys and of the means, (B, L), 1 = valid.
        gate: Linear(d, 1), shared by the layers.
        eps: see `attend`.
        causal: a token sees those up to itself; a confidence for each token, from running means.
        keep: see `attend`.

    Returns:
        (B, L, d).
    """
    pooled_anchor = pooled(anchor, mask, causal)[0]
    weights = confidences(pooled_anchor, [t.pooled(mask, causal) for t in targets], gate)
    total: Tensor | None = None
    for target, weight in zip(targets, weights.split(1, dim=-1), strict=True):
        part = attend(anchor, target, mask, eps, identity=True, causal=causal, confidence=weight, keep=keep)
        total = part if total is None else total + part
    assert total is not None
    return total


class _Guide(torch.autograd.Function):
    """Pools cells of a frozen grid by how well they fit a guide; keeps grid, guide and one number a position.

    s = sum over channels of guide * grid; w = relu(s) / (cell sum + eps) + 1 / r^2; result: cell sums of w * grid.
    """

    @staticmethod
    def forward(ctx: Any, guide: Tensor, grid: Tensor, eps: float) -> Tensor:
        share = _per_position(guide, grid).relu_()
        rate = grid.shape[-1] // guide.shape[-1]
        norm = _cells(share, rate) + eps  # (B, n, n)
        weights = share / _spread(norm, rate)
        ctx.save_for_backward(guide, grid, weights, norm)
        return _per_cell(weights + 1 / rate**2, grid, rate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        guide, grid, weights, norm = ctx.saved_tensors
        rate = grid.shape[-1] // guide.shape[-1]
        d_weights = _per_position(grad, grid)
        d_share = (d_weights - _spread(_cells(d_weights * weights, rate), rate)) / _spread(norm, rate)
        return _per_cell(d_share * (weights > 0), grid, rate), None, None


def _spread(x: Tensor, rate: int) -> Tensor:
    """(..., n, n) -> (..., rn, rn), every value r x r times."""
    return x.repeat_interleave(rate, dim=-2).repeat_interleave(rate, dim=-1)


def _cells(x: Tensor, rate: int) -> Tensor:
    """Sums of r x r cells, (B, rn, rn) -> (B, n, n)."""
    return F.avg_pool2d(x[:, None], rate, divisor_override=1)[:, 0]


def _chunks(grid: Tensor) -> list[slice]:
    """Channels of one sample that fit into the cache."""
    size = max(1, _CACHE_BYTES.get(grid.device.type, _OTHER_BYTES) // (4 * grid[0, 0].numel() * grid.element_size()))
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


class _Read(torch.autograd.Function):
    """A single query on u = relu(h), (B, L, D): attended sum, its weight, and scores are made again for backward.

    Keeps h as it came, and vectors. Gives the sum (B, D) and the sum of its shares (B,).
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, key: Tensor, offset: Tensor, mask: Tensor | None,
                eps: float) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(maps, key, offset, mask)
        ctx.eps = eps
        with torch.autocast(maps.device.type, enabled=False):  # bound by memory, not by products
            u, scores, norm = _Read.scores(maps, key, offset, mask, eps)
            shares = scores / norm
            return torch.bmm(shares[:, None], u)[:, 0], shares.sum(dim=-1)

    @staticmethod
    def scores(maps: Tensor, key: Tensor, offset: Tensor, mask: Tensor | None,
               eps: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """u (B, L, D), relu(scores) (B, L) and their guarded sum (B, 1)."""
        u = F.relu(maps.to(key.dtype))
        scores = torch.bmm(u, key[..., None])[..., 0] + offset[:, None]
        scores = F.relu(scores if mask is None else scores * mask)
        return u, scores, scores.sum(dim=-1, keepdim=True).clamp(min=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor, d_amount: Tensor) -> tuple[Tensor | None, ...]:
        maps, key, offset, mask = ctx.saved_tensors
        u, scores, norm = _Read.scores(maps, key, offset, mask, ctx.eps)
        d_shares = torch.bmm(u, d_sum[..., None].to(u.dtype))[..., 0] + d_amount[:, None]
        along = (d_shares * scores).sum(dim=-1, keepdim=True) / norm**2
        d_scores = d_shares / norm - along * (norm > ctx.eps)  # the guard has no slope
        d_scores = d_scores * (scores > 0)
        if mask is not None:
            d_scores = d_scores * mask
        return None, torch.bmm(d_scores[:, None], u)[:, 0], d_scores.sum(dim=-1), None, None


def read_vector(maps: Tensor, key: Tensor, offset: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """ReLU attention of one query a sample on relu(maps), rows of unit L1 norm, the norm at least `eps`.

    Args:
        maps: (B, L, D), frozen.
        key: (B, D); a token's score is key . relu(h) + offset.
        offset: (B,).
        mask: (B, L), 1 = valid.
        eps: smallest norm.

    Returns:
        The attended sum (B, D), and the sum of its weights (B,).
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    return _Read.apply(maps, key.to(dtype), offset.to(dtype), mask, eps)


def guided_pool(guide: Tensor, grid: Tensor, eps: float) -> Tensor:
    """A frozen grid (B, C, rn, rn) shrunk to its guide's size (B, C, n, n); see `_Guide`. The grid gets no gradient."""
    return _Guide.apply(guide.to(grid.dtype), grid, eps)
