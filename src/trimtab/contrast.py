"""Two losses of models that compare pictures and texts in one space, and then read them together.

contrast   which picture belongs to which text of the batch? cross entropy of similarities, both ways
matching   does this text belong to this picture? each pair, and for each a wrong text and a wrong picture, drawn
           from the batch in proportion to how similar they seem (ALBEF: Li et al., NeurIPS 2021, section 3.2)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab import divided


def contrast(image: Tensor, text: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor]:
    """Vectors of length 1, (B, E) each -> similarities (B, B), images by texts, and the contrastive loss.

    Of a batch that is divided among processes, similarities are those of the whole batch.
    """
    image, text = divided.gathered(image), divided.gathered(text)
    similar = image @ text.T / temperature
    pairs = torch.arange(len(similar), device=similar.device)
    return similar, (F.cross_entropy(similar, pairs) + F.cross_entropy(similar.T, pairs)) / 2


def hard_pairs(similar: Tensor) -> tuple[Tensor, Tensor]:
    """For every picture a wrong text, and for every text a wrong picture, drawn by similarity: numbers (B,), (B,).

    Args:
        similar: (B, B), images by texts; the pairs stand on the diagonal.

    Raises:
        ValueError: if the batch has one pair only, so that there is nothing wrong to draw.
    """
    if len(similar) < 2:
        raise ValueError("the matching loss takes wrong texts and pictures from the batch: give two pairs or more")
    own = torch.eye(len(similar), dtype=torch.bool, device=similar.device)
    with torch.no_grad():
        texts = similar.softmax(dim=1).masked_fill(own, 0) + 1e-9 * ~own  # (B, B): a chance for all, as published
        images = similar.T.softmax(dim=1).masked_fill(own, 0) + 1e-9 * ~own
        return tuple(divided.agreed(torch.multinomial(x, 1)[:, 0]) for x in (texts, images))  # type: ignore[return-value]


def matching(similar: Tensor, judge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Loss of telling pairs from mismatches.

    Args:
        similar: (B, B), images by texts; of the whole of a divided batch, each process judges its part.
        judge: numbers of images and of texts (N,) in the whole batch -> logits of "apart" and "together" (N, 2).

    Raises:
        ValueError: if the batch has one pair only.
    """
    texts, images = (found[divided.own(len(similar))] for found in hard_pairs(similar))
    pairs = torch.arange(len(similar), device=similar.device)[divided.own(len(similar))]
    size = len(pairs)
    logits = judge(torch.cat([pairs, pairs, images]), torch.cat([pairs, texts, pairs]))  # (3 B, 2)
    return F.cross_entropy(logits.float(), (torch.arange(3 * size, device=logits.device) < size).long())
