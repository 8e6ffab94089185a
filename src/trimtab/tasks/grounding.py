"""Phrase grounding: the box of the one thing that a phrase means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.data.images import decode_rows
from trimtab.tasks.base import TASKS, Batch, Task


class BoxHead(nn.Module):
    """Every image token votes for a box and says how much its vote counts; the box is the weighted mean.

    Needs no grid and no order of the tokens (their positions are in their features), so that it serves any backbone.
    """

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 5))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, P, D) -> centre x, centre y, width, height as shares of the picture, (B, 4)."""
        weight, box = self.layers(tokens).float().split([1, 4], dim=-1)
        return (weight.softmax(dim=1) * box.sigmoid()).sum(dim=1)


@TASKS.register("grounding")
class Grounding(Task):
    """Columns `image`, `phrase`, `box` (left, top, right, bottom in pixels of the picture).

    Loss as in DETR (section 3.1): 5 x L1 + 2 x generalised IoU. Accuracy: share of boxes with IoU of at least 0.5.
    """

    name = "grounding"
    columns = ("phrase", "box")
    primary = "accuracy@0.5"
    kinds = ("joint",)
    blank = {"box": (0, 0, 1, 1)}

    def head(self, backbone: Any) -> nn.Module:
        return BoxHead(backbone.width)

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        sizes = torch.tensor([r["image"].size * 2 for r in rows], dtype=torch.float32)  # (B, 4): W, H, W, H
        return {
            **backbone.images([r["image"] for r in rows]),
            **backbone.texts([r["phrase"] for r in rows]),
            "boxes": torch.tensor([r["box"] for r in rows], dtype=torch.float32) / sizes,
            "sizes": sizes,
        }

    def example(self, backbone: Any, size: int) -> Batch:
        box = torch.tensor([0.2, 0.2, 0.6, 0.6]).expand(size, 4)
        return {**backbone.example(size), "boxes": box, "sizes": torch.ones(size, 4)}

    def _boxes(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        encoded = backbone.pair(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
        return head(encoded.tokens[:, encoded.image_tokens])

    def loss(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        found = self._boxes(backbone, head, batch)
        target = batch["boxes"]
        centred = torch.cat([(target[:, :2] + target[:, 2:]) / 2, target[:, 2:] - target[:, :2]], dim=-1)
        _, generalised = iou(corners(found), target)
        return 5 * F.l1_loss(found, centred) + 2 * (1 - generalised).mean()

    def predict(self, backbone: Any, head: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        boxes = corners(self._boxes(backbone, head, batch)).clamp(0, 1)
        overlap, _ = iou(boxes, batch["boxes"])
        pixels = (boxes * batch["sizes"]).tolist()
        return [{"box": box, "iou": o} for box, o in zip(pixels, overlap.tolist(), strict=True)]

    def score(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]], rows: Any) -> dict[str, float]:
        overlap = torch.tensor([r["iou"] for r in records])
        return {"accuracy@0.5": (overlap >= 0.5).float().mean().item(), "mean IoU": overlap.mean().item()}

    def gallery(self, records: list[dict[str, Any]], rows: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {"query": rows[i]["phrase"], "prediction": f"IoU {records[i]['iou']:.2f}", "target": "box",
             "correct": records[i]["iou"] >= 0.5, "box_predicted": [round(x, 1) for x in records[i]["box"]],
             "box_target": list(rows[i]["box"])}
            for i in indices
        ]  # fmt: skip


def corners(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) -> (left, top, right, bottom), last axis 4."""
    centre, side = boxes.split(2, dim=-1)
    return torch.cat([centre - side / 2, centre + side / 2], dim=-1)


def iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al., CVPR 2019) of boxes in pairs, (N, 4) corners -> (N,), (N,)."""

    def area(x: Tensor) -> Tensor:
        return (x[:, 2:] - x[:, :2]).clamp(min=0).prod(dim=-1)

    inner = torch.cat([torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])], dim=-1)
    hull = torch.cat([torch.minimum(a[:, :2], b[:, :2]), torch.maximum(a[:, 2:], b[:, 2:])], dim=-1)
    common, enclosing = area(inner), area(hull).clamp(min=1e-9)
    union = (area(a) + area(b) - common).clamp(min=1e-9)
    overlap = common / union
    return overlap, overlap - (enclosing - union) / enclosing
