"""What all uses of UniPT compute: ReLU attention of an anchor on a layer's tokens, summed over layers by confidence.

    S = relu(A z^T * mask) / (row sums + eps)     (B, Q, L); no scale, no softmax, no query, key or value maps
    M = sum_l c_l (S_l z_l + z_l)                 c = softmax over layers of w . (pool A * pool z_l) + b

The published code keeps every S_l, adds an identity matrix to it and stacks all products before it weights them. Here:

* The confidences need pooled features only, so they come first, and the layers are added to one sum one by one.
* "+ identity" is `+ z_l`; dividing by the row sums comes after the product with z_l, where rows are shorter.
* S_l is computed again in the backward pass, in blocks of rows that stay in the processor's cache until they are used,
  and is never whole in memory.
* Anchor and layers are kept as their normalised value x (`Target`); z = x * weight + bias is made again, and the mean
  of z follows from the mean of x.

What autograd keeps of a layer is its input (D a token, for the weights of `down`) and x (d a token).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.methods.tune.unipt.down import Target

# Scores that are looked at together: on a CPU what fits into its cache, on a GPU enough work for one launch.
CACHE_BYTES = {"cpu": 1 << 20}
OTHER_BYTES = 256 << 20

Keep = bool | Literal["auto"]


class _How(NamedTuple):
    """Settings of `_Merge`, as in `attend`."""

    eps: float
    identity: bool
    causal: bool
    keep: bool


class _Merge(torch.autograd.Function):
    """sum_l c_l (S_l z_l [+ z_l]); keeps its inputs and, unless told to keep it, computes S_l again for backward.

    Targets come flat: x, weight and bias of the anchor, then of each layer.
    """

    @staticmethod
    def forward(ctx: Any, how: _How, mask: Tensor | None, confidence: Tensor | None, *flat: Tensor | None) -> Tensor:
        anchor, *layers = _targets(flat)
        ctx.how, ctx.count, kind = how, len(flat), anchor.x.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else anchor.x.dtype
        out, kept = torch.zeros_like(anchor.x, memory_format=torch.contiguous_format), []
        for part, blocks in _parts(anchor.x, layers[0].x):
            a, seen = _of(anchor, part).to(ctx.dtype), None if mask is None else mask[part]
            for layer, target in enumerate(layers):
                z = _of(target, part)
                values, keys = z.to(ctx.dtype), _keys(z, seen, ctx.dtype)
                for rows in blocks:
                    stop = rows.stop if how.causal else None
                    ratios, norm = _scores(a[:, rows], keys[:, :stop], rows.start, how, z.dtype)
                    kept += [ratios, norm] if how.keep else []
                    c, sums = _confidence(confidence, part, rows, layer, out), out[part, rows]
                    sums.addcmul_(torch.bmm(ratios, values[:, :stop]).to(sums.dtype), (c / norm).to(sums.dtype))
                    if how.identity:
                        sums += z[:, rows] * c
        ctx.save_for_backward(mask, confidence, *flat, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mask, confidence, *rest = ctx.saved_tensors
        how, dtype, kept = ctx.how, ctx.dtype, iter(rest[ctx.count :])
        anchor, *layers = _targets(rest[: ctx.count])
        slopes = [_Slope(target) for target in (anchor, *layers)]
        d_confidence = None if confidence is None else torch.zeros_like(confidence)
        for part, blocks in _parts(anchor.x, layers[0].x):
            a, seen = _of(anchor, part).to(dtype), None if mask is None else mask[part]
            d_a = torch.zeros_like(a, dtype=grad.dtype)
            for layer, target in enumerate(layers):
                z = _of(target, part)
                values, keys = z.to(dtype), _keys(z, seen, dtype)
                d_z = torch.zeros_like(z)  # through the values
                d_keys = d_z if seen is None else torch.zeros_like(z)
                for rows in blocks:
                    stop = rows.stop if how.causal else None
                    if how.keep:
                        ratios, norm = next(kept), next(kept)
                    else:
                        ratios, norm = _scores(a[:, rows], keys[:, :stop], rows.start, how, z.dtype)
                    g, c = grad[part, rows], _confidence(confidence, part, rows, layer, grad)
                    scaled = g / norm
                    # Of O = R z / n: dR_ij = (g_i . z_j - g_i . O_i) / n_i, where R is positive; then times c_i.
                    d_ratios = torch.bmm(scaled.to(dtype), values[:, :stop].transpose(1, 2))
                    along = (ratios * d_ratios).sum(dim=-1, keepdim=True, dtype=z.dtype)  # g_i . O_i
                    d_ratios -= (along / norm).to(dtype)
                    d_scores = torch.ops.aten.threshold_backward(d_ratios, ratios, 0)
                    d_a[:, rows].addcmul_(torch.bmm(d_scores, keys[:, :stop]).to(g.dtype), c.expand_as(along))
                    _add_product(d_keys[:, :stop], d_scores.transpose(1, 2), (a[:, rows] * c).to(dtype))
                    _add_product(d_z[:, :stop], ratios.transpose(1, 2), (scaled * c).to(dtype))
                    if how.identity:
                        along += (g * z[:, rows]).sum(dim=-1, keepdim=True)
                        d_z[:, rows] += g * c
                    if d_confidence is not None:
                        gain = _confidence(d_confidence, part, rows, layer, grad)
                        gain += along if gain.shape[1] > 1 else along.sum(dim=1, keepdim=True)
                if seen is not None:
                    d_z.addcmul_(d_keys, seen[..., None].to(d_z.dtype))
                slopes[layer + 1].put(part, d_z)
            slopes[0].put(part, d_a)
        return None, None, d_confidence, *(gradient for slope in slopes for gradient in slope.all())


class _Slope:
    """Gradients of a target's x, weight and bias, made of z's, a few samples at a time."""

    def __init__(self, target: Target):
        self.target, self.x = target, torch.empty_like(target.x)
        self.weight, self.bias = (None if t is None else torch.zeros_like(t) for t in target[1:])

    def put(self, part: slice, d_z: Tensor) -> None:
        if self.weight is None:
            self.x[part] = d_z
        else:
            self.bias += d_z.sum(dim=(0, 1))
            self.weight += (d_z * self.target.x[part]).sum(dim=(0, 1))
            self.x[part] = d_z.mul_(self.target.weight)

    def all(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias


def _targets(flat: Sequence[Tensor | None]) -> list[Target]:
    return [Target(*flat[i : i + 3]) for i in range(0, len(flat), 3)]  # type: ignore[arg-type]


def _of(target: Target, part: slice) -> Tensor:
    """z of a few samples."""
    return Target(target.x[part], *target[1:]).tokens()


def _parts(anchor: Tensor, x: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Samples that are looked at together, with the blocks of queries in which their scores are made."""
    limit = CACHE_BYTES.get(anchor.device.type, OTHER_BYTES) // 4
    queries, length = anchor.shape[1], x.shape[1]
    size = max(1, limit // max(1, queries * length))
    rows = min(queries, max(1, limit // max(1, length)))
    blocks = [slice(start, min(start + rows, queries)) for start in range(0, queries, rows)]
    for start in range(0, len(x), size):
        yield slice(start, start + size), blocks


def _scores(a: Tensor, keys: Tensor, first: int, how: _How, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """relu(a keys^T), (B, q, L), and its guarded row sums, (B, q, 1); the first query's position is `first`."""
    ratios = torch.bmm(a, keys.transpose(1, 2)).relu_()
    if how.causal:
        ratios = ratios.tril_(first)
    sums = ratios.sum(dim=-1, keepdim=True, dtype=dtype)
    # A row of zeros stays one whatever it is divided by; 1 / eps would be infinite in half precision.
    return ratios, torch.where(sums > 0, sums + how.eps, 1.0)


def _keys(z: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """z where the mask is 1, else 0: so are its scores."""
    return (z if mask is None else z * mask[..., None]).to(dtype)


def _confidence(confidence: Tensor | None, part: slice, rows: slice, layer: int, like: Tensor) -> Tensor:
    """One layer's factors of a block's rows, (B, 1 or q, 1)."""
    if confidence is None:
        return like.new_ones(1, 1, 1)
    return confidence[part, rows if confidence.shape[1] > 1 else slice(None), layer : layer + 1]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; sums over blocks stay in the total's precision."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


def attend(anchor: Target, targets: Sequence[Target], mask: Tensor | None, eps: float, identity: bool = False,
           causal: bool = False, confidence: Tensor | None = None, keep: Keep = False) -> Tensor:  # fmt: skip
    """ReLU attention with rows of unit L1 norm, summed over layers: no scale, no softmax, no query, key or value maps.

    Args:
        anchor: the queries, (B, Q, d).
        targets: each layer's keys, also its values, (B, L, d).
        mask: (B, L), 1 = valid; multiplies the scores before the ReLU, so that padding keys get weight 0.
        eps: added to the norm.
        identity: adds z_l at its own position; needs Q = L.
        causal: a token sees those up to itself.
        confidence: each layer's factor, (B, 1, N) or (B, Q, N).
        keep: keep the scores for the backward pass instead of computing them again: N Q L numbers a sample more. `auto`
            keeps them where they are few beside the layers' tokens, Q <= d / 4.

    Returns:
        (B, Q, d).
    """
    if keep == "auto":
        keep = 4 * anchor.x.shape[1] <= anchor.x.shape[2]
    flat = [tensor for target in (anchor, *targets) for tensor in target]
    return _Merge.apply(_How(eps, identity, causal, bool(keep)), mask, confidence, *flat)


def confidences(anchor: Tensor, pooled_targets: list[Tensor], gate: nn.Linear) -> Tensor:
    """Softmax over layers of gate(pooled anchor * pooled target): (B, 1 or L, d) each -> (B, 1 or L, N)."""
    logits = torch.cat([gate(anchor * p) for p in pooled_targets], dim=-1)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1).to(anchor.dtype)


def merge(anchor: Target, targets: list[Target], mask: Tensor | None, gate: nn.Linear, eps: float,
          causal: bool = False, keep: Keep = False) -> Tensor:  # fmt: skip
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
    weights = confidences(anchor.pooled(mask, causal), [t.pooled(mask, causal) for t in targets], gate)
    return attend(anchor, targets, mask, eps, True, causal, weights, keep)
