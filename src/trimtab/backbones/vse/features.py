"""VSE-infinity for tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.backbones.base import Backbone, Encoded, Pictures, find_tokenizer, load_pretrained


class VseBackbone(Backbone):
    """A VSE-infinity that sees whole pictures, squashed to a square of 512 pixels as published."""

    kind = "dual"

    def __init__(self, name: str, model: Any, tokenizer: Any):
        if model.config.cnn is None:
            raise ValueError(f"{name}: reads regions of bottom-up attention, which are no pictures; "
                             "`trimtab.backbones.load_official` gives the plain model")  # fmt: skip
        self.caffe = bool(model.config.cnn["caffe"])
        pictures = Pictures(512, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        if self.caffe:  # detectors take bytes from which the mean is taken, nothing else; blue comes first
            mean = (122.7717 / 255, 115.9465 / 255, 102.9801 / 255)
            pictures = Pictures(512, mean, (1 / 255,) * 3)
        super().__init__(name, model, tokenizer, pictures, model.config.embed)

    def images(self, pictures: Any) -> dict[str, Tensor]:
        """PIL images -> `pixel_values` (B, 3, H, W)."""
        pixels = self.pictures(pictures)
        return {"pixel_values": pixels.flip(1) if self.caffe else pixels}

    def image(self, pixel_values: Tensor) -> Encoded:
        return Encoded(self.model.encode_image(pixel_values))

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        return Encoded(self.model.encode_text(input_ids, attention_mask))


def load(folder: Path, name: str, pretrained: bool = True) -> VseBackbone:
    """A folder that `trimtab convert` or `save_pretrained` wrote; with a tokenizer if there is one in it."""
    from trimtab.backbones.vse.model import VseInfinity

    return VseBackbone(name, load_pretrained(VseInfinity, folder, pretrained), find_tokenizer(folder))
