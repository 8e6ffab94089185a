"""CLIP4Clip for tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.backbones.base import CLIP_MEAN, CLIP_STD, Backbone, Encoded, Pictures, find_tokenizer, load_pretrained
from trimtab.backbones.pictures import Cropped
from trimtab.backbones.processed import own_pictures


class Clip4ClipBackbone(Backbone):
    """A CLIP4Clip for videos; one with a head without a sense of time (meanP) also takes a picture as a video of one
    frame."""

    own_scale = True

    def __init__(self, name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None):
        config = model.config
        self.kind = "dual" if config.head == "meanP" and config.depth == 1 else "video"
        vision, text = config.clip_config.vision_config, config.clip_config.text_config
        pictures = pictures or Cropped(vision.image_size, CLIP_MEAN, CLIP_STD)
        super().__init__(name, model, tokenizer, pictures, config.clip_config.projection_dim,
                         min(text.max_position_embeddings, 32))  # fmt: skip
        self.side = vision.image_size

    def image(self, pixel_values: Tensor) -> Encoded:
        if self.kind != "dual":
            return super().image(pixel_values)
        return Encoded(self.model.encode_video(pixel_values[:, None])[:, 0])

    def frames(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_video(pixel_values)

    def compare(self, text: Tensor, frames: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        """Similarities (T, B) by the model's own head, which has its own scale.

        Raises:
            ValueError: if there are more frames than the head has positions for.
        """
        config = self.model.config
        if config.head in ("seqTransf", "tightTransf"):
            longest = config.cross_config.max_position_embeddings - (config.head == "tightTransf")
            if frames.shape[1] > longest:
                raise ValueError(f"{self.name}: videos of {frames.shape[1]} frames, its head {config.head!r} has "
                                 f"positions for {longest}: lower the task's `frames`")  # fmt: skip
        return self.model.compare(text, frames, mask)

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

    model = load_pretrained(Clip4Clip, folder, pretrained)
    return Clip4ClipBackbone(name, model, find_tokenizer(folder), own_pictures(folder))
