"""What all uses of UniPT compute: ReLU attention of an anchor on a layer's tokens, summed over layers by confidence.

    S = relu(A z^T * mask) / (row sums + eps)     (B, Q, L); no scale, no softmax, no query, key or value maps
    M = sum_l c_l (S_l z_l + z_l)                 c = softmax over layers of w . (pool A * pool z_l) + b

The published code keeps every S_l, adds an identity matrix to it and stacks all products before it weights them. Here:

* The confidences need pooled features only, so they come first, and the layers are added to one sum one by one.
* "+ identity" is `+ z_l`; dividing by the row sums comes after the product with z_l, where rows are shorter.
* S_l is computed again in the backward pass, in blocks of rows that stay in the processor's cache until they are used,
  and is never whole in memory.
* A layer may have another number of tokens than the anchor (towers that merge tokens between stages): all are attended
  to, and it has no identity term, for no token of it stands where the anchor's does. The published code has the term
  only among maps of equal length; its pyramid makes them so (`guided_down`), which needs a grid.
* Padding is neither a key nor, where a tower attends to itself, a query: nothing reads what becomes of it.
* Anchor and layers are kept as their normalised value x (`Target`); z = x * weight + bias is made again, and the mean
  of z follows from the mean of x.

What autograd keeps of a layer is its input (D a token, for the weights of `down`) and x (d a token).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.methods.tune.unipt.down import Target, some
from trimtab.sizes import unlike

# Scores that are looked at together: on a CPU what fits into its cache, on a GPU enough work for one launch.
CACHE_BYTES = {"cpu": 1 << 19}
OTHER_BYTES = 256 << 20

Keep = bool | Literal["auto"]


class _How(NamedTuple):
    """Settings of `_Merge`, as in `attend`."""

    eps: float
    identity: bool
    causal: bool
    keep: bool
    skip_padding: bool


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
        for part in _unlike_parts(anchor.x, layers, mask, how):
            a = part.queries(anchor).to(ctx.dtype)
            merged = out[part.samples] if part.own is None else torch.zeros_like(a, dtype=out.dtype)
            for layer, target in _unlike_layers(layers, how):
                z = part.tokens(target)
                keys = part.keys(z, ctx.dtype)
                for rows in part.blocks:
                    stop = rows.stop if how.causal else None
                    ratios = _ratios(torch.bmm(a[:, rows], keys[:, :stop].transpose(1, 2)), rows, how)
                    norm = _norm(ratios, how, z.dtype)
                    kept += [ratios, norm] if how.keep else []
                    c, sums = part.confidence(confidence, rows, layer, out), merged[:, rows]
                    sums.addcmul_(torch.bmm(ratios, keys[:, :stop]).to(sums.dtype), (c / norm).to(sums.dtype))
                    if how.identity and aligned(anchor, target):
                        sums += z[:, rows] * c
            if part.own is not None:
                out[part.samples].index_copy_(1, part.own, merged)
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
        for part in _unlike_parts(anchor.x, layers, mask, how):
            a, g = part.queries(anchor).to(dtype), _take(grad[part.samples], part.own)
            d_a = torch.zeros_like(a, dtype=grad.dtype)
            for layer, target in _unlike_layers(layers, how):
                z = part.tokens(target)
                keys = part.keys(z, dtype)
                d_z = torch.zeros_like(z)
                for rows in part.blocks:
                    seen, gr = keys[:, : rows.stop if how.causal else None], g[:, rows]
                    c = part.confidence(confidence, rows, layer, grad)
                    if how.keep:
                        ratios, norm = next(kept), next(kept)
                    else:
                        ratios = _ratios(torch.bmm(a[:, rows], seen.transpose(1, 2)), rows, how)
                        norm = _norm(ratios, how, z.dtype)
                    scaled = gr / norm
                    # Of O = R z / n: dR_ij = (g_i . z_j - g_i . O_i) / n_i, where R is positive; then times c_i.
                    d_ratios = torch.bmm(scaled.to(dtype), seen.transpose(1, 2))
                    along = (ratios * d_ratios).sum(dim=-1, keepdim=True, dtype=z.dtype)  # g_i . O_i
                    d_ratios -= (along / norm).to(dtype)
                    torch.ops.aten.threshold_backward.grad_input(d_ratios, ratios, 0, grad_input=d_ratios)
                    d_a[:, rows].addcmul_(torch.bmm(d_ratios, seen).to(gr.dtype), c.expand_as(along))
                    through = d_z[:, : seen.shape[1]]
                    _add_product(through, d_ratios, (a[:, rows] * c).to(dtype))
                    _add_product(through, ratios, (scaled * c).to(dtype))
                    if how.identity and aligned(anchor, target):
                        along += (gr * z[:, rows]).sum(dim=-1, keepdim=True)
                        d_z[:, rows] += gr * c
                    if d_confidence is not None:
                        part.add_confidence(d_confidence, rows, layer, along)
                slopes[layer + 1].put(part.samples, part.index, d_z)
            slopes[0].put(part.samples, part.own, d_a)
        return None, None, d_confidence, *(gradient for slope in slopes for gradient in slope.all())


class _Slope:
    """Gradients of a target's x, weight and bias, made of z's, a few samples at a time."""

    def __init__(self, target: Target):
        self.target, self.x = target, torch.empty_like(target.x)
        self.scale: Any = target.weight
        self.weight, self.bias = (None if t is None else torch.zeros_like(t) for t in target[1:])

    def put(self, samples: slice, index: Tensor | None, d_z: Tensor) -> None:
        if self.weight is not None and self.bias is not None:
            self.bias += d_z.sum(dim=(0, 1))
            self.weight += (d_z * _take(self.target.x[samples], index)).sum(dim=(0, 1))
            d_z = d_z.mul_(self.scale)
        if index is None:
            self.x[samples] = d_z
        else:
            self.x[samples] = 0
            self.x[samples].index_copy_(1, index, d_z.to(self.x.dtype))

    def all(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias


def _targets(flat: Sequence[Tensor | None]) -> list[Target]:
    return [Target(*flat[i : i + 3]) for i in range(0, len(flat), 3)]  # type: ignore[arg-type]


def _longest(layers: Sequence[Target]) -> Tensor:
    """The x of the layer with the most tokens."""
    longest = layers[0].x
    for layer in layers:
        longest = layer.x if layer.x.shape[1] > longest.shape[1] else longest
    return longest


def aligned(anchor: Target, target: Target) -> bool:
    """Whether a layer has as many tokens as the anchor: then they stand at the same positions."""
    return anchor.x.shape[1] == target.x.shape[1]


def _take(x: Tensor, index: Tensor | None) -> Tensor:
    """Some tokens of (B, L, d)."""
    return x if index is None else x.index_select(1, index)


@dataclass
class _Part:
    """Samples that are looked at together.

    Attributes:
        samples: which.
        index: their tokens (keys) that are valid in any of them, (l,); None for all.
        own: the same of the anchor's tokens (queries).
        seen: the mask of these keys, (b, l, 1); None if all are valid.
        blocks: the queries in the blocks in which their scores are made.
    """

    samples: slice
    index: Tensor | None
    own: Tensor | None
    seen: Tensor | None
    blocks: list[slice]

    def sizes(self, samples: int) -> tuple[Any, ...]:
        """What decides the sizes of all that is made of this part of so many samples."""
        made = [None if t is None else t.shape for t in (self.index, self.own, self.seen)]
        return len(range(*self.samples.indices(samples))), made, self.blocks

    def queries(self, anchor: Target) -> Tensor:
        return Target(_take(anchor.x[self.samples], self.own), *anchor[1:]).tokens()

    def tokens(self, target: Target) -> Tensor:
        return Target(_take(target.x[self.samples], self.index), *target[1:]).tokens()

    def keys(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        """z where the mask is 1, else 0: so are its scores, and as values they are not counted either."""
        return (z if self.seen is None else z * self.seen).to(dtype)

    def _of(self, confidence: Tensor, rows: slice, layer: int) -> Tensor:
        of = confidence[self.samples, :, layer : layer + 1]
        return of if of.shape[1] == 1 else _take(of, self.own)[:, rows]

    def confidence(self, confidence: Tensor | None, rows: slice, layer: int, like: Tensor) -> Tensor:
        """One layer's factors of a block's rows, (b, 1 or q, 1)."""
        if confidence is None:
            return like.new_ones(1, 1, 1)
        return self._of(confidence, rows, layer)

    def add_confidence(self, total: Tensor, rows: slice, layer: int, gain: Tensor) -> None:
        """Add a block's (b, q, 1)."""
        of = total[self.samples, :, layer : layer + 1]
        if of.shape[1] == 1:
            of += gain.sum(dim=1, keepdim=True)
        elif self.own is None:
            of[:, rows] += gain
        else:
            of.index_add_(1, self.own[rows], gain)


def _parts(anchor: Tensor, x: Tensor, mask: Tensor | None, how: _How) -> Iterator[_Part]:
    """The samples, as many at a time as have their scores looked at together."""
    limit = CACHE_BYTES.get(anchor.device.type, OTHER_BYTES) // 4
    size = min(len(x), max(1, limit // max(1, anchor.shape[1] * x.shape[1])))
    for start in range(0, len(x), max(1, size)):
        samples, index, seen = slice(start, start + size), None, None
        if mask is not None:
            index = some(mask[samples].any(dim=0)) if how.skip_padding else None
            if index is None or size > 1:  # else they are the valid ones
                seen = _take(mask[samples], index)[..., None]
        queries = anchor.shape[1] if index is None or not how.identity else len(index)
        rows = max(1, limit // max(1, x.shape[1] if index is None else len(index)))
        blocks = [slice(first, min(first + rows, queries)) for first in range(0, queries, rows)]
        yield _Part(samples, index, index if how.identity else None, seen, blocks)


def _unlike_parts(anchor: Tensor, layers: list[Target], mask: Tensor | None, how: _How) -> Iterator[_Part]:
    """The parts; where memory is counted and nothing else, without those that repeat what was counted."""
    parts = _parts(anchor, _longest(layers), mask, how)
    return parts if how.keep else unlike(parts, lambda part: part.sizes(len(anchor)))


def _unlike_layers(layers: list[Target], how: _How) -> Iterator[tuple[int, Target]]:
    """The layers with their numbers, as `_unlike_parts`."""
    numbered = enumerate(layers)
    return numbered if how.keep else unlike(numbered, lambda layer: [t if t is None else _layout(t) for t in layer[1]])


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype


def _ratios(scores: Tensor, rows: slice, how: _How) -> Tensor:
    """relu of a block's scores, (b, q, l), in their place; a causal token sees none that is later."""
    scores = scores.relu_()
    return scores.tril_(rows.start) if how.causal else scores


def _norm(ratios: Tensor, how: _How, dtype: torch.dtype) -> Tensor:
    """The guarded sums of rows, (b, q, 1)."""
    sums = ratios.sum(dim=-1, keepdim=True, dtype=dtype)
    # A row of zeros stays one whatever it is divided by; 1 / eps would be infinite in half precision.
    return torch.where(sums > 0, sums + how.eps, 1.0)


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x^T y; sums over blocks stay in the total's precision."""
    if total.dtype == x.dtype:
        total.baddbmm_(x.transpose(1, 2), y)
    else:
        total += torch.bmm(x.transpose(1, 2), y)


def attend(anchor: Target, targets: Sequence[Target], mask: Tensor | None, eps: float, identity: bool = False,
           causal: bool = False, confidence: Tensor | None = None, keep: Keep = False,
           skip_padding: bool = False) -> Tensor:  # fmt: skip
    """ReLU attention with rows of unit L1 norm, summed over layers: no scale, no softmax, no query, key or value maps.

    Args:
        anchor: the queries, (B, Q, d).
        targets: each layer's keys, also its values, (B, L_l, d).
        mask: (B, L), 1 = valid, else 0; padding keys get weight 0. Only where all layers have L tokens.
        eps: added to the norm.
        identity: adds z_l at its own position, where Q = L_l.
        causal: a token sees those up to itself; needs Q = L_l.
        confidence: each layer's factor, (B, 1, N) or (B, Q, N).
        keep: keep the scores for the backward pass instead of computing them again: N Q L numbers a sample more. `auto`
            keeps them where they are few beside the layers' tokens, Q <= d / 2.
        skip_padding: leave padding out of the products: keys that are valid in none of the samples that are looked at
            together, and with `identity` queries too, whose results are 0.

    Returns:
        (B, Q, d).
    """
    if keep == "auto":
        keep = 2 * anchor.x.shape[1] <= anchor.x.shape[2]
    skip_padding = skip_padding and (identity or not causal)  # causal queries and keys must be the same tokens
    flat = [tensor for target in (anchor, *targets) for tensor in target]
    return _Merge.apply(_How(eps, identity, causal, bool(keep), skip_padding), mask, confidence, *flat)


def check_lengths(maps: Sequence[Tensor], mask: Tensor | None, causal: bool = False) -> None:
    """ValueError if hidden maps of several numbers of tokens have a mask, which is of one, or an order."""
    lengths = sorted({m.shape[1] for m in maps})
    if len(lengths) > 1 and (causal or mask is not None):
        why = "their tower is causal" if causal else "a mask"
        raise ValueError(
            f"unipt: hidden maps have {lengths} tokens, and {why}: expected one number of tokens; name maps of one "
            "number in `layers`"
        )


def confidences(anchor: Tensor, pooled_targets: list[Tensor], gate: nn.Linear) -> Tensor:
    """Softmax over layers of gate(pooled anchor * pooled target): (B, 1 or L, d) each -> (B, 1 or L, N)."""
    # Not called: where it is not trained it may have been cast with the frozen model.
    weight, bias = gate.weight.to(anchor.dtype), gate.bias.to(anchor.dtype)
    logits = torch.cat([F.linear(anchor * p, weight, bias) for p in pooled_targets], dim=-1)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1).to(anchor.dtype)


def merge(anchor: Target, targets: list[Target], mask: Tensor | None, gate: nn.Linear, eps: float,
          causal: bool = False, keep: Keep = False, skip_padding: bool = False,
          first: bool = False) -> Tensor:  # fmt: skip
    """The layers' attended tokens with the identity term, summed by confidence.

    Args:
        anchor: (B, L, d).
        targets: N of them, (B, L_l, d).
        mask: of the keys and of the means, (B, L), 1 = valid.
        gate: Linear(d, 1), shared by the layers.
        eps: see `attend`.
        causal: a token sees those up to itself; a confidence for each token, from running means.
        keep, skip_padding: see `attend`; one token's scores are always kept.
        first: of the first token alone, which sees all (not with `causal`).

    Returns:
        (B, L, d), with `first` (B, 1, d).
    """
    weights = confidences(anchor.pooled(mask, causal), [t.pooled(mask, causal) for t in targets], gate)
    if not first:
        return attend(anchor, targets, mask, eps, True, causal, weights, keep, skip_padding)
    # The identity term, (B, N, d).
    own = torch.cat([t.first() if aligned(anchor, t) else torch.zeros_like(t.first()) for t in targets], dim=1)
    return attend(Target(anchor.first()), targets, mask, eps, confidence=weights, keep=True) + weights @ own
