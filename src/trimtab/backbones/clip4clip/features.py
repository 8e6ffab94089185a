"""CLIP4Clip for tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.backbones.base import CLIP_MEAN, CLIP_STD, Backbone, Encoded, Pictures, find_tokenizer, load_pretrained


class Clip4ClipBackbone(Backbone):
    """A CLIP4Clip for tasks of pictures: each is a video of one frame, which takes a head without a sense of time."""

    kind = "dual"

    def __init__(self, name: str, model: Any, tokenizer: Any):
        config = model.config
        if config.head != "meanP" or config.depth > 1:
            raise ValueError(
                f"{name}: a CLIP4Clip with head {config.head!r} over {config.depth} frames is for videos, of which we "
                "have no tasks yet; `trimtab.backbones.load_official` gives the plain model"
            )
        vision, text = config.clip_config.vision_config, config.clip_config.text_config
        super().__init__(name, model, tokenizer, Pictures(vision.image_size, CLIP_MEAN, CLIP_STD),
                         config.clip_config.projection_dim, min(text.max_position_embeddings, 32))  # fmt: skip

    def image(self, pixel_values: Tensor) -> Encoded:
        return Encoded(self.model.encode_video(pixel_values[:, None])[:, 0])

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        return Encoded(self.model.encode_text(input_ids, attention_mask))

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return self.model.config.clip_config.text_config.vocab_size

    @property
    def logit_scale(self) -> Tensor:
        """Natural logarithm of the factor by which cosines are multiplied, a scalar parameter."""
        return self.model.clip.logit_scale


def load(folder: Path, name: str, pretrained: bool = True) -> Clip4ClipBackbone:
    """A folder that `trimtab convert` or `save_pretrained` wrote; with a tokenizer if there is one in it."""
    from trimtab.backbones.clip4clip.model import Clip4Clip

    return Clip4ClipBackbone(name, load_pretrained(Clip4Clip, folder, pretrained), find_tokenizer(folder))
