"""Selection: the k-th smallest of many scores, and masks of the smallest or largest ones. True = kept.

Exactly the number that is asked for goes. Which of several equal scores go is the same in every run: first those of
smaller weights, then the last in the matrix. Published pruners compare with a threshold and take all that equal it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from trimtab.methods.prune.made import Listed, pieces

_SMALL = 1 << 14  # below it one call of kthvalue costs less than the passes of the radix selection
_DIGIT = 11


def kth_smallest(scores: Sequence[Tensor], count: int) -> Tensor:
    """The `count`-th smallest of all elements of several tensors, as a scalar tensor: exactly `kthvalue` of their
    concatenation, which is never made.

    Few elements are sorted out by `kthvalue`. Of many, the answer's bits are found from the highest down, eleven a pass
    (radix selection): a pass counts, among the elements that share the bits found so far, which digit comes next. The
    memory is that of one chunk, however many elements there are.

    Args:
        scores: floating point tensors of one type and any shapes, without NaN.
        count: from 1 to the number of elements.

    Raises:
        ValueError: if `count` lies outside that range.
    """
    total = sum(_numbers(scores))
    if not 1 <= count <= total:
        raise ValueError(f"the {count}-th smallest of {total} scores was asked for: expected 1 to {total}")
    if total <= _SMALL:
        return torch.cat([s.flatten() for s in scores]).kthvalue(count).values
    bits = 64 if any(s.dtype == torch.float64 for s in scores) else 32
    if bits == 64:
        scores = [s.double() for s in scores]  # the same tensors, unless types are mixed
    found = shift = 0
    for width in [_DIGIT] * (bits // _DIGIT) + [bits % _DIGIT]:
        above = bits - shift
        low = above - width
        counts = torch.zeros(1 << width, dtype=torch.long, device=scores[0].device)
        # The highest digit holds the sign: shifted up by half its range, it counts from 0 as the others do.
        offset = 1 << (width - 1) if shift == 0 else 0
        for key in _keys(scores):
            if shift:
                key = key[(key >> above) == found]
            digits = (key >> low) + offset if shift == 0 else (key >> low) & ((1 << width) - 1)
            counts += torch.bincount(digits, minlength=1 << width)
        ends = counts.cumsum(0)
        digit = int(torch.searchsorted(ends, count))
        count -= int(ends[digit] - counts[digit])
        found = digit - offset if shift == 0 else (found << width) | digit
        shift += width
    floating, integer = (torch.float64, torch.int64) if bits == 64 else (torch.float32, torch.int32)
    key = torch.tensor([found], dtype=integer, device=scores[0].device)
    return _ordered(key).view(floating)[0].to(scores[0].dtype)


def _numbers(scores: Sequence[Tensor]) -> list[int]:
    """How many elements each tensor has; those that are made when they are looked at (`made.Listed`) know it."""
    known: list[int] | None = getattr(scores, "sizes", None)
    return [s.numel() for s in scores] if known is None else known


def _keys(scores: Sequence[Tensor]) -> Iterator[Tensor]:
    """Pieces of the tensors as integers in the same order; halves become single precision, which changes no order."""
    for i in range(len(scores)):
        for piece in _pieces(scores, i):  # a tensor is let go before the next is looked at, which may make it
            wide = piece if piece.dtype == torch.float64 else piece.float()
            yield _ordered(wide.view(torch.int64 if wide.dtype == torch.float64 else torch.int32))


def _pieces(scores: Sequence[Tensor], i: int) -> Iterator[Tensor]:
    """The elements of one of several tensors, a few at a time; some know how to without making the whole."""
    return scores.pieces(i) if isinstance(scores, Listed) else pieces(scores[i])


def _ordered(bits: Tensor) -> Tensor:
    """The bits of floats as integers of the same order, and back: negative floats count backwards."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def below(scores: Sequence[Tensor], count: int, weights: Sequence[Tensor] | None = None) -> list[int]:
    """How many elements each of several tensors gives, so that exactly the `count` smallest of them all go.

    Of equal scores those of smaller weights go first. What is equal in both is given by the tensors in proportion to
    how much of it they have, so that a model of equal weights loses the same share everywhere.

    Args:
        scores: floating point tensors of one type and any shapes, without NaN.
        count: up to the number of elements.
        weights: tensors of the same shapes, whose magnitudes tell equal scores apart; None: nothing does.
    """
    if count < 1:
        return [0] * len(scores)
    threshold = kth_smallest(scores, count)
    found = [_sides(_pieces(scores, i), threshold) for i in range(len(scores))]  # one look at each
    given, equal = (list(column) for column in zip(*found, strict=True))
    wanted = count - sum(given)
    if weights is not None and wanted < sum(equal):
        more = below(_where(scores, threshold, weights, equal), wanted)
    else:
        more, before = [], 0
        for number in equal:
            more.append(wanted * (before + number) // sum(equal) - wanted * before // sum(equal))
            before += number
    return [a + b for a, b in zip(given, more, strict=True)]


def _sides(elements: Iterable[Tensor], threshold: Tensor) -> tuple[int, int]:
    """How many lie below a threshold, and how many equal it."""
    below = equal = 0
    for piece in elements:
        below += int((piece < threshold).count_nonzero())
        equal += int((piece == threshold).count_nonzero())
    return below, equal


def _where(scores: Sequence[Tensor], value: Tensor, weights: Sequence[Tensor], equal: list[int]) -> Sequence[Tensor]:
    """Magnitudes of the weights whose score has a value, of each tensor as many as `equal` says.

    They are written into one tensor that is there before: small ones, left among large ones that come and go, would
    keep an allocator from using the room of these again.
    """
    found: Tensor | None = None
    for i, number in enumerate(equal):
        if not number:
            continue
        weight = weights[i]
        found = torch.empty(sum(equal), dtype=weight.dtype, device=weight.device) if found is None else found
        found[sum(equal[:i]) :][:number] = weight[scores[i] == value].abs()
        del weight
    assert found is not None
    return found.split(equal)


def going(scores: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Places along the last axis in the order in which they go: the smallest score first, of equal scores the smaller
    size, of what is equal in both the last."""
    count = scores.shape[-1]
    if sizes is None:
        order = torch.arange(count - 1, -1, -1, device=scores.device).expand(scores.shape)
    else:
        order = count - 1 - sizes.flip(-1).argsort(dim=-1, stable=True)
    return order.gather(-1, scores.gather(-1, order).argsort(dim=-1, stable=True))


def smallest(scores: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """Mask that is False at exactly `count` of the smallest scores.

    Of equal scores those of smaller weights go first, of what is equal in both the last.
    """
    if count < 1:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = kth_smallest([scores], count)
    mask = (scores > threshold).contiguous()  # a weight stored (in, out) is a view with other strides
    tied = (scores == threshold).flatten().nonzero()[:, 0]
    stay = len(tied) - (count - int((scores < threshold).count_nonzero()))  # a sum copies into 8 bytes a number
    if stay:
        order = going(torch.zeros_like(tied) if weights is None else weights.flatten()[tied].abs())
        mask.view(-1)[tied[order[len(tied) - stay :]]] = True
    return mask


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask that is True at exactly `count` of the largest scores; of equal ones the first stay."""
    mask = torch.zeros_like(scores, dtype=torch.bool).flatten()
    order = scores.flatten().argsort(descending=True, stable=True)
    mask[order[:count]] = True
    return mask.view(scores.shape)


def largest_of_each(scores: Tensor, group: int, kept: int, weights: Tensor | None = None) -> Tensor:
    """Mask (out, in) that is True at exactly `kept` of the largest scores in each `group` inputs that follow each
    other; of equal ones the larger weights stay, then the first."""
    groups = scores.reshape(len(scores), -1, group)
    order = going(groups, None if weights is None else weights.abs().reshape(groups.shape))[..., group - kept :]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).view(scores.shape)
