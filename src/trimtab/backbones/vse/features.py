"""VSE-infinity for tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.backbones.base import Backbone, Encoded, Pictures, find_tokenizer, load_pretrained
from trimtab.backbones.pictures import IMAGENET_MEAN, IMAGENET_STD, Stretched
from trimtab.backbones.processed import own_pictures


class VseBackbone(Backbone):
    """A VSE-infinity that sees whole pictures, squashed to a square of 512 pixels as published; texts are not cut."""

    kind = "dual"

    def __init__(self, name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None):
        if model.config.cnn is None:
            raise ValueError(f"{name}: reads regions of bottom-up attention, which are no pictures; "
                             "`trimtab.backbones.load_official` gives the plain model")  # fmt: skip
        self.caffe = bool(model.config.cnn["caffe"])
        own = Stretched(512, IMAGENET_MEAN, IMAGENET_STD)
        if self.caffe:  # detectors take bytes from which the mean is taken, nothing else; blue comes first
            mean = (122.7717 / 255, 115.9465 / 255, 102.9801 / 255)
            own = Stretched(512, mean, (1 / 255,) * 3, flip=True)
        longest = model.config.text_config.max_position_embeddings
        super().__init__(name, model, tokenizer, pictures or own, model.config.embed, longest)

    def image(self, pixel_values: Tensor) -> Encoded:
        return Encoded(self.model.encode_image(pixel_values))

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        return Encoded(self.model.encode_text(input_ids, attention_mask))


def load(folder: Path, name: str, pretrained: bool = True) -> VseBackbone:
    """A folder that `trimtab convert` or `save_pretrained` wrote; with a tokenizer if there is one in it."""
    from trimtab.backbones.vse.model import VseInfinity

    model = load_pretrained(VseInfinity, folder, pretrained)
    found = own_pictures(folder)
    backbone = VseBackbone(name, model, find_tokenizer(folder), found)
    if backbone.caffe and found is not None and not isinstance(found, Stretched):
        raise ValueError(f"{folder / 'preprocessor_config.json'}: this network takes blue first, as no image "
                         "processor of transformers does: without it pictures are taken as its authors do")  # fmt: skip
    return backbone
