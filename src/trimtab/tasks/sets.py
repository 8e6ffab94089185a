"""Set prediction as MDETR trains it (Kamath et al., ICCV 2021, section 2.2; `models/matcher.py`, `models/mdetr.py`).

Objects Q are matched with the T things that a text names, at every decoder layer anew. A matched object is asked for
the thing's box and, softly, for the tokens of its words; every other for "no object", at a tenth of the weight. Objects
and words lie near each other in a common space if they belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab import divided
from trimtab.tasks.grounding import corners, iou

CLASS, DISTANCE, OVERLAP, ALIGN = 1.0, 5.0, 2.0, 1.0  # weights of losses; the first three of matching costs too
NO_OBJECT = 0.1
TEMPERATURE = 0.07


@dataclass(frozen=True)
class Things:
    """What the texts of a batch name.

    Attributes:
        boxes: (B, T, 4) centre and sides as shares of the picture.
        tokens: (B, T, L) bool, which tokens of the text mean it.
        there: (B, T) bool; a row with fewer than T things has False at the end.
    """

    boxes: Tensor
    tokens: Tensor
    there: Tensor


def spans_to_tokens(encoding: Any, row: int, text: str, spans: Sequence[Sequence[int]], length: int) -> Tensor:
    """Which tokens hold characters of the spans, (length,) bool.

    A span that begins or ends at a character of no token (a blank) is shortened by up to two characters on that side; a
    span without tokens, such as one that was cut off, counts for nothing. As published.

    Args:
        encoding: of a fast tokenizer, which tells the token of a character.
        row: of the text in it.
        text: for the error.
        spans: (begin, end) in characters, the end not included.
        length: how many tokens there are.

    Raises:
        ValueError: if a span does not lie in the text.
    """
    out = torch.zeros(length, dtype=torch.bool)
    for begin, end in spans:
        if not 0 <= begin < end <= len(text):
            raise ValueError(f"tokens_positive: expected spans from 0 to {len(text)} in {text!r}, found "
                             f"{[begin, end]}")  # fmt: skip
        after, before = range(begin, min(begin + 3, len(text))), range(end - 1, max(end - 4, -1), -1)
        first = next((t for c in after if (t := encoding.char_to_token(row, c)) is not None), None)
        last = next((t for c in before if (t := encoding.char_to_token(row, c)) is not None), None)
        if first is not None and last is not None:
            out[first : last + 1] = True
    return out


def soft(things: Things, slots: int) -> Tensor:
    """The share of each slot of `class_embed` in a thing, (B, T, slots): equal for its tokens."""
    shares = F.pad(things.tokens.float(), (0, slots - things.tokens.shape[-1]))
    return shares / (shares.sum(dim=-1, keepdim=True) + 1e-6)


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, things: Things) -> Tensor:
    """The object that stands for each thing, (B, T), so that the whole cost of a row is least; 0 for what is not there.

    Args:
        logits: (B, Q, slots).
        boxes: (B, Q, 4), centre and sides.

    Raises:
        ValueError: if a row has more things than there are objects.
    """
    kind = -(logits.float().softmax(dim=-1) @ soft(things, logits.shape[-1]).transpose(1, 2))  # (B, Q, T)
    distance = torch.cdist(boxes.float(), things.boxes, p=1)
    _, generalised = iou(corners(boxes.float())[:, :, None], corners(things.boxes)[:, None])
    cost = CLASS * kind + DISTANCE * distance - OVERLAP * generalised
    if cost.shape[2] == 1:  # one thing a row, as in referring expressions: nobody competes for an object
        return cost.argmin(dim=1)
    found = torch.zeros(things.there.shape, dtype=torch.long)
    for i, (costs, there) in enumerate(zip(cost.cpu(), things.there.cpu(), strict=True)):
        if there.sum() > len(costs):
            raise ValueError(f"row {i} names {int(there.sum())} things, the model gives {len(costs)} objects")
        objects, which = _solved(costs[:, there])
        found[i, there.nonzero().squeeze(1)[which]] = objects
    return found.to(cost.device)


def _solved(costs: Tensor) -> tuple[Tensor, Tensor]:
    """The assignment of least cost (Hungarian method): objects, and the things that they stand for."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(costs.numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns)


def set_loss(found: dict[str, Tensor], things: Things) -> Tensor:
    """The loss of all levels, each matched by itself; every level weighs as much as the last (auxiliary losses).

    Args:
        found: `logits` (levels, B, Q, slots), `boxes` (levels, B, Q, 4: centre and sides), and, if objects are aligned
            with words, `objects` (levels, B, Q, E) and `words` (B, L, E), of length 1.
        things: what should be found.

    Returns:
        A scalar: the sum over levels, of the sums over objects, a thing of the batch.
    """
    total = found["logits"].new_zeros(()).float()
    for level, (logits, boxes) in enumerate(zip(found["logits"], found["boxes"], strict=True)):
        matched = match(logits, boxes, things)
        total = total + CLASS * _words_loss(logits.float(), matched, things) + _boxes_loss(boxes, matched, things)
        if "objects" in found:
            similar = found["objects"][level].float() @ found["words"].float().transpose(1, 2) / TEMPERATURE
            total = total + ALIGN * _align_loss(similar, matched, things)
    return divided.mean(total, things.there.sum())


def _words_loss(logits: Tensor, matched: Tensor, things: Things) -> Tensor:
    """Soft cross-entropy of every object over slots (B, Q, slots), summed."""
    rows, which = things.there.nonzero(as_tuple=True)
    target = torch.zeros_like(logits)
    target[..., -1] = 1
    target[rows, matched[rows, which]] = soft(things, logits.shape[-1])[rows, which]
    weight = torch.full(logits.shape[:2], NO_OBJECT, device=logits.device)
    weight[rows, matched[rows, which]] = 1
    return -(weight * (logits.log_softmax(dim=-1) * target).sum(dim=-1)).sum()


def _boxes_loss(boxes: Tensor, matched: Tensor, things: Things) -> Tensor:
    """L1 distance and generalised IoU of matched boxes, weighted and summed."""
    rows, which = things.there.nonzero(as_tuple=True)
    mine, target = boxes[rows, matched[rows, which]].float(), things.boxes[rows, which]
    _, generalised = iou(corners(mine), corners(target))
    return DISTANCE * (mine - target).abs().sum() + OVERLAP * (1 - generalised).sum()


def _align_loss(similar: Tensor, matched: Tensor, things: Things) -> Tensor:
    """Contrast of objects with tokens, in both directions, from (B, Q, L), summed.

    Padding and special tokens are negatives too, as published.
    """
    rows, which = things.there.nonzero(as_tuple=True)
    belong = torch.zeros(similar.shape, dtype=torch.bool, device=similar.device)
    belong[rows, matched[rows, which]] = things.tokens[rows, which]

    def contrast(axis: int) -> Tensor:
        pull = -similar.masked_fill(~belong, 0).sum(dim=axis) / (belong.sum(dim=axis) + 1e-6)
        return (pull + similar.logsumexp(dim=axis)).masked_fill(~belong.any(dim=axis), 0).sum()

    return (contrast(2) + contrast(1)) / 2
