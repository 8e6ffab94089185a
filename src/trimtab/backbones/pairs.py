"""What the models of NLVR2 share: a text and two pictures go in, one vector comes out."""

from __future__ import annotations

from typing import Any

from torch import nn

from trimtab.backbones.base import Backbone
from trimtab.backbones.pictures import CLIP_MEAN, CLIP_STD, Pictures


class PairBackbone(Backbone):
    """A model that reads two pictures at once; a family adds `pair_of`.

    Attributes:
        words: at how many tokens the authors cut texts.
    """

    kind = "pairs"
    words: int

    def __init__(self, name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None):
        text, side = model.config.text_config, model.config.vision_config.image_size
        pictures = pictures or Pictures(side, CLIP_MEAN, CLIP_STD)
        longest = min(text.max_position_embeddings, self.words)
        super().__init__(name, model, tokenizer, pictures, text.hidden_size, longest)
        self.side = side

    @property
    def pair_width(self) -> int:
        return self.width

    def own_head(self, task: str) -> nn.Module | None:
        """The published classifier."""
        return self.model.cls_head if task == "pairs" else None
