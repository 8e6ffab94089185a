"""MDETR for tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.backbones.base import Backbone, Pictures, find_tokenizer, load_pretrained
from trimtab.backbones.pictures import IMAGENET_MEAN, IMAGENET_STD, Bounded, pixel_mask
from trimtab.backbones.processed import own_pictures

SHORT, LONG = 800, 1333  # pixels of the sides in the authors' evaluation


class MdetrBackbone(Backbone):
    """An MDETR: what a text names in a picture, as a set of objects."""

    kind = "detector"
    reads_padding = True

    def __init__(self, name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None):
        config = model.config
        text = config.text_config
        # A token is a slot of `class_embed`, whose last one stands for "no object".
        longest = min(text.max_position_embeddings - text.pad_token_id - 1, config.classes - 1)
        pictures = pictures or Bounded(SHORT, IMAGENET_MEAN, IMAGENET_STD, longest=LONG)
        super().__init__(name, model, tokenizer, pictures, config.width, longest)

    def detect(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Objects after each decoder layer, or each level of a side network, (levels, B, Q, D), and the encoded text,
        (B, L, D).

        Args:
            pixel_values: (B, 3, H, W), padded with zeros on the right and below.
            input_ids, attention_mask: (B, L).
        """
        mask = None if self.pictures.fixed else pixel_mask(pixel_values)
        states, text = self.model.states(pixel_values, input_ids, attention_mask, mask)
        return states[:, :, : self.model.config.queries], text

    @property
    def slots(self) -> int:
        """Places of tokens to which an object can belong, and one more for "no object"."""
        return self.model.config.classes

    def own_head(self, task: str) -> nn.Module | None:
        """The published heads: which words, where, and what aligns objects with words."""
        from trimtab.backbones.mdetr.model import SetHeads

        return SetHeads(self.model) if task == "set-grounding" else None


def load(folder: Path, name: str, pretrained: bool = True) -> MdetrBackbone:
    """A folder that `trimtab convert` or `save_pretrained` wrote; with a tokenizer if there is one in it."""
    from trimtab.backbones.mdetr.model import Mdetr

    model = load_pretrained(Mdetr, folder, pretrained)
    return MdetrBackbone(name, model, find_tokenizer(folder), own_pictures(folder))
