"""Vision towers for tasks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.backbones.base import Backbone, Encoded, Pictures, load_pretrained, read_pictures
from trimtab.backbones.pictures import IMAGENET_MEAN, IMAGENET_STD
from trimtab.backbones.processed import own_pictures

# Model type -> transformers' class, and how its tokens become a vector, as its own classifier does it.
KINDS = {
    "vit": ("ViTModel", "class token"),
    "dinov2": ("Dinov2Model", "class token and mean"),
    "swin": ("SwinModel", "mean"),
}
# With what their authors normalise, where a folder does not say it; Google's ViTs and `Pictures` with 0.5.
NORMS = dict.fromkeys(("dinov2", "swin"), (IMAGENET_MEAN, IMAGENET_STD))

log = logging.getLogger(__name__)


class VisionBackbone(Backbone):
    """A vision tower; `example` and `texts` know no words."""

    kind = "vision"

    def __init__(self, name: str, model: Any, pictures: Pictures):
        config = model.config
        self.pooling = KINDS[config.model_type][1]
        factor = 2 if self.pooling == "class token and mean" else 1
        super().__init__(name, model, None, pictures, factor * config.hidden_size, max_text=0)
        self.token_width = config.hidden_size
        self.side = config.image_size if config.model_type == "vit" else None  # the others take other sizes too

    def image(self, pixel_values: Tensor) -> Encoded:
        """Tokens (B, L, D) behind the last norm, and one vector: ViT's class token, as `ViTForImageClassification`
        reads it; DINOv2's class token and the mean of its patches; the mean of Swin's."""
        tokens = self.model(pixel_values=pixel_values).last_hidden_state
        if self.pooling == "mean":
            return Encoded(tokens.mean(dim=1), tokens, image_tokens=slice(0, tokens.shape[1]))
        pooled = tokens[:, 0]
        if self.pooling == "class token and mean":
            pooled = torch.cat([pooled, tokens[:, 1:].mean(dim=1)], dim=-1)
        return Encoded(pooled, tokens, image_tokens=slice(1, tokens.shape[1]))

    def example(self, batch: int = 1, text_tokens: int | None = None) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(batch, 3, *self.pictures.shape, generator=generator)}


def load(folder: Path, name: str, pretrained: bool = True) -> VisionBackbone:
    """A transformers folder of a tower, with or without a classifier, which is left out."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, KINDS[config["model_type"]][0])
    # Nothing reads the pooler of a ViT or a Swin, and folders of a classifier have none.
    options = {} if config["model_type"] == "dinov2" else {"add_pooling_layer": False}
    model: Any = load_pretrained(kind, folder, pretrained, **options)
    side = model.config.image_size
    pictures = read_pictures(folder, side, Pictures(side, *NORMS.get(config["model_type"], ())))
    if own_pictures(folder) is None:
        log.warning("%s: no preprocessor_config.json: pictures are squashed to %d pixels, with the mean %s: save the "
                    "model's own image processor there if it is another", folder, side, pictures.mean)  # fmt: skip
    return VisionBackbone(name, model, pictures)
