"""The objective of BLIP's and X-VLM's pretraining, on pairs of a picture and a text: what pruners calibrate with.

    contrast   which picture belongs to which text of the batch? cross entropy of similarities, both ways
    matching   does this text belong to this picture? pairs, and for each a wrong text and a wrong picture, drawn from
               the batch in proportion to how similar they seem
    words      BLIP writes the text word by word (labels smoothed by 0.1); X-VLM finds masked words again

Left out: momentum copies with their queues (BLIP), and regions with their boxes (X-VLM), which plain pairs do not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PretrainingLoss(nn.Module):
    """A backbone behind its own pretraining objective: `forward(**batch)` gives `{"loss": scalar}`.

    Args:
        backbone: a pretrained BLIP or X-VLM, as `trimtab.load` gives it.
    """

    def __init__(self, backbone: Any):
        super().__init__()
        self.backbone = backbone

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.backbone.pretraining_loss(**batch)}


def contrast(image: Tensor, text: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of length 1, (B, E) each -> similarities (B, B), images by texts, and the contrastive loss."""
    similar = image @ text.T / temperature
    pairs = torch.arange(len(similar), device=similar.device)
    return similar, (F.cross_entropy(similar, pairs) + F.cross_entropy(similar.T, pairs)) / 2


def matching(similar: Tensor, judge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Loss of telling pairs from mismatches.

    Args:
        similar: (B, B), images by texts.
        judge: numbers of images and of texts (N,) -> logits of "apart" and "together" (N, 2).

    Raises:
        ValueError: if the batch has one pair only, so that there is nothing wrong to draw.
    """
    size = len(similar)
    if size < 2:
        raise ValueError("the matching loss takes wrong texts and pictures from the batch: give two pairs or more")
    pairs = torch.arange(size, device=similar.device)
    own = torch.eye(size, dtype=torch.bool, device=similar.device)
    with torch.no_grad():
        texts = similar.softmax(dim=1).masked_fill(own, 0) + 1e-9 * ~own  # (B, B): a chance for all, as published
        images = similar.T.softmax(dim=1).masked_fill(own, 0) + 1e-9 * ~own
        texts, images = torch.multinomial(texts, 1)[:, 0], torch.multinomial(images, 1)[:, 0]
    logits = judge(torch.cat([pairs, pairs, images]), torch.cat([pairs, texts, pairs]))  # (3 B, 2)
    return F.cross_entropy(logits.float(), (torch.arange(3 * size, device=logits.device) < size).long())
