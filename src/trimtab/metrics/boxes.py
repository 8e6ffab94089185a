"""Referring expressions: overlap of boxes, and the accuracies of RefCOCO, X-VLM and MDETR."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.metrics.checking import paired


def corners(boxes: Tensor) -> Tensor:
    """(..., 4) left, top, width, height -> left, top, right, bottom."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def centred_corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre, width, height -> left, top, right, bottom."""
    half = boxes[..., 2:] / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], dim=-1)


def _overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union of boxes that stand beside each other, both (...)."""
    sides = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(0)
    shared = sides.prod(dim=-1)
    areas = (first[..., 2:] - first[..., :2]).prod(dim=-1) + (second[..., 2:] - second[..., :2]).prod(dim=-1)
    return shared, areas - shared


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4), left, top, right, bottom, that broadcast -> (...)."""
    shared, union = _overlap(first, second)
    return shared / union


def giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019): less the share of the hull that neither box covers."""
    shared, union = _overlap(first, second)
    sides = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    hull = sides.prod(dim=-1)
    return shared / union - (hull - union) / hull


def xvlm_iou(first: Tensor, second: Tensor) -> Tensor:
    """X-VLM's and refer's (`computeIoU`): the ordinary one, but an overlap of at most one pixel in x or y is none."""
    shared, union = _overlap(first, second)
    sides = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    seen = ((sides - 1) > 0).all(dim=-1)
    return torch.where(seen, shared / union, torch.zeros_like(shared))


def _boxes(values: Any, what: str) -> Tensor:
    """(N, 4) corners with an area."""
    values = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
    if values.dim() != 2 or values.shape[1] != 4:
        raise ValueError(f"{what}: expected boxes (N, 4), found shape {tuple(values.shape)}")
    # "not greater" holds for NaN too
    bad = (~(values[:, 2:] >= values[:, :2]).all(dim=1) | ~values.isfinite().all(dim=1)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"{what}: row {row}: expected left, top, right, bottom, found {values[row].tolist()}")
    return values


def accuracy(predicted: Any, true: Any, threshold: float = 0.5, rule: str = "iou") -> dict[str, Any]:
    """Share of boxes whose overlap with the true one is at least the threshold, 0 to 1: P@1, RefCOCO's number.

    Args:
        predicted: (N, 4) left, top, right, bottom.
        true: (N, 4) likewise.
        threshold: an overlap of exactly this is right.
        rule: `iou`, or `x-vlm`.

    Returns:
        `accuracy`, and `iou` (N,).

    Raises:
        ValueError: for unequal lengths, no boxes, or a box (with its row) that is turned over, has a number that is not
            finite, or in the truth no area.
    """
    rules = {"iou": iou, "x-vlm": xvlm_iou}
    if rule not in rules:
        raise ValueError(f"rule must be one of {', '.join(rules)}, found {rule!r}")
    predicted, true = _boxes(predicted, "predicted boxes"), _boxes(true, "true boxes")
    paired(predicted, true, ("predicted boxes", "true boxes"))
    flat = ((true[:, 2:] - true[:, :2]).prod(dim=1) == 0).nonzero()
    if len(flat):
        raise ValueError(f"true boxes: row {int(flat[0])} has no area: {true[int(flat[0])].tolist()}")
    found = rules[rule](predicted, true)
    return {"accuracy": float((found >= threshold).double().mean()), "iou": found}


def accuracy_by(groups: Sequence[str], overlaps: Tensor, threshold: float = 0.5) -> dict[str, float]:
    """`accuracy` of each group (a split: val, testA, testB; a data set)."""
    paired(groups, overlaps, ("groups", "overlaps"))
    right: dict[str, list[bool]] = defaultdict(list)
    for group, overlap in zip(groups, overlaps.tolist(), strict=True):
        right[group].append(overlap >= threshold)
    return {group: sum(found) / len(found) for group, found in right.items()}


def best_first(scores: Tensor, boxes: Tensor) -> Tensor:
    """Boxes (N, 4) in MDETR's order: by score, then by the larger list of coordinates.

    Raises:
        ValueError: for unequal lengths or no boxes.
    """
    paired(scores, boxes, ("scores", "boxes"))
    order = sorted(zip(scores.tolist(), boxes.tolist(), range(len(boxes)), strict=True), reverse=True)
    return boxes[[place for _, _, place in order]]


def mdetr_precision(
    predictions: Sequence[tuple[Tensor, Tensor]], true: Tensor, groups: Sequence[str], ks: Sequence[int] = (1, 5, 10),
    threshold: float = 0.5,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """MDETR's P@k (`RefExpEvaluator`): whether one of the first k boxes has a *generalised* IoU of 0.5 with the truth.

    Single precision, as there. Its list of results is these sorted ascending. `accuracy` is the usual accuracy, of the
    first box by ordinary IoU.

    Args:
        predictions: of each expression, scores (Q,) and boxes (Q, 4), left, top, right, bottom.
        true: (N, 4) likewise.
        groups: the data set of each expression.

    Returns:
        Data set -> `P@k` and `accuracy`, 0 to 1.

    Raises:
        ValueError: with the row, for boxes that are turned over or not finite, or unequal lengths.
    """
    true = _boxes(torch.as_tensor(true, dtype=torch.float32), "true boxes")
    paired(predictions, true, ("predictions", "true boxes"))
    paired(groups, true, ("groups", "true boxes"))
    hits: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row, ((scores, boxes), group) in enumerate(zip(predictions, groups, strict=True)):
        try:
            ordered = _boxes(best_first(scores, boxes).float(), "boxes")
        except ValueError as error:
            raise ValueError(f"prediction {row}: {error}") from None
        overlaps = giou(ordered, true[row])
        for k in ks:
            hits[group][f"P@{k}"].append(bool(overlaps[:k].max() >= threshold))
        hits[group]["accuracy"].append(bool(iou(ordered[0], true[row]) >= threshold))
    return {group: {name: sum(h) / len(h) for name, h in found.items()} for group, found in hits.items()}


def mdetr_boxes(logits: Tensor, boxes: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
    """MDETR's outputs as scores and boxes in pixels (`PostProcess`).

    Args:
        logits: (B, Q, slots); the last slot means "no object".
        boxes: (B, Q, 4) centre, width, height as shares of the picture.
        sizes: (B, 2) height, width in pixels, in this order.

    Returns:
        Of each picture `scores` (Q,), one less the probability of the last slot, and `boxes` (Q, 4), left, top, right,
        bottom; they may reach beyond the picture.

    Raises:
        ValueError: for shapes that do not fit.
    """
    if sizes.shape != (len(logits), 2) or boxes.shape != (*logits.shape[:2], 4):
        raise ValueError(f"expected logits (B, Q, slots), boxes (B, Q, 4), sizes (B, 2), found {tuple(logits.shape)}, "
                         f"{tuple(boxes.shape)}, {tuple(sizes.shape)}")  # fmt: skip
    scores = 1 - logits.softmax(dim=-1)[..., -1]
    scale = sizes.flip(1).repeat(1, 2)[:, None]  # (B, 1, 4) width, height, width, height
    return [
        {"scores": s, "boxes": b} for s, b in zip(scores, centred_corners(boxes) * scale, strict=True)
    ]  # fmt: skip
