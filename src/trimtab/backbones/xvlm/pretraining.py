"""X-VLM's pretraining objective on a batch of pairs; see `trimtab.backbones.pretraining`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab import divided
from trimtab.contrast import contrast, matching

MASKED = 0.4  # share of words that X-VLM's configuration masks


def xvlm_loss(model: Any, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, mask_id: int) -> Tensor:
    """Sum of the three losses of an `Xvlm` for pretraining (`xvlm.py`, `model_pretrain.py`)."""
    images = model.encode_image(pixel_values)
    text = model.encode_text(input_ids, attention_mask)
    image, words = model.features(images, text)
    similar, contrastive = contrast(image, words, model.temp)

    pictures, texts, mask = (divided.gathered(x) for x in (images, text, attention_mask))

    def judge(i: Tensor, t: Tensor) -> Tensor:
        return model.itm_head(model.fuse(texts[t], mask[t], pictures[i])[:, 0])

    match = matching(similar, judge)
    length = attention_mask.sum(dim=1, keepdim=True)
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    words = (place > 0) & (place < length - 1)  # neither the first token nor the one that ends the text
    masked = words & (divided.drawn(input_ids.shape, input_ids.device) < MASKED)
    masked |= words & (place == 1) & ~masked.any(dim=1, keepdim=True)  # one at least
    text = model.encode_text(input_ids.masked_fill(masked, mask_id), attention_mask)
    fused = model.fuse(text, attention_mask, images)
    scores = model.text_encoder.scores(fused[masked]).float()
    found = F.cross_entropy(scores, input_ids[masked], reduction="sum")
    return contrastive + match + divided.mean(found, masked.sum())
