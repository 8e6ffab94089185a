"""Referring expressions by regression: the box of a phrase from the fused class token (X-VLM, section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.tasks.base import TASKS, Batch
from trimtab.tasks.grounding import Grounding, centred, corners, iou, visible
from trimtab.tasks.labelled import own_or


@TASKS.register("box-regression")
class BoxRegression(Grounding):
    """Columns as of `grounding`; needs no grid of image tokens.

    The head is X-VLM's (two linear layers, twice as wide between, with LayerNorm and GELU), a copy of the model's own
    where it has one; a sigmoid makes centre, width and height as shares of the picture of its four outputs. Loss: L1
    distance summed over the four numbers + 1 - generalised IoU, means over the batch (`get_bbox_loss`).
    """

    schema = "grounding"
    first_token = True

    def head(self, backbone: Any) -> nn.Module:
        width = backbone.width
        layers = (nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, 4))
        return own_or(backbone, self.name, 4, nn.Sequential(*layers))

    def _boxes(self, backbone: Any, head: nn.Module, batch: Batch) -> Any:
        """Corners, and centres with sides, as shares of what the model sees, (B, 4) each."""
        encoded = backbone.pair(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
        found = head(encoded.pooled).float().sigmoid()
        return corners(found), found

    def loss(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        found, middle = self._boxes(backbone, head, batch)
        target, seen = visible(batch["boxes"], found)
        _, generalised = iou(found, target)
        distance = torch.where(seen, (middle - centred(target)).abs(), 0).sum(dim=-1)
        return (distance + torch.where(seen[:, 0], 1 - generalised, 0)).mean()

    def fold(self, backbone: Any, head: nn.Module) -> None:
        """The head goes where the model has one of its own."""
        if (own := backbone.own_head(self.name)) is not None:
            own.load_state_dict(head.state_dict())
