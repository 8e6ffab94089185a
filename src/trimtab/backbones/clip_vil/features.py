"""CLIP-ViL for tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.backbones.base import CLIP_MEAN, CLIP_STD, Backbone, Encoded, Pictures, find_tokenizer, load_pretrained


class ClipVilBackbone(Backbone):
    """A CLIP-ViL: text and places of the picture in one sequence, text first."""

    kind = "joint"

    def __init__(self, name: str, model: Any, tokenizer: Any):
        text = model.config.text_config
        # The authors keep the shape, shorter side 384, and pad to 384 x 640; here pictures become a square of 384.
        side = min(384, 32 * model.config.positions)
        super().__init__(name, model, tokenizer, Pictures(side, CLIP_MEAN, CLIP_STD), text.hidden_size,
                         min(text.max_position_embeddings, 20))  # fmt: skip

    def look(self, pixel_values: Tensor) -> Tensor:
        """Embedded places of the pictures, (B, h*w, D)."""
        return self.model.look(pixel_values)

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """`pair` of what `look` returned."""
        out = self.model(seen=seen, input_ids=input_ids, attention_mask=attention_mask)
        tokens = torch.cat([out.text, out.image], dim=1)  # (B, L + h*w, D)
        mask = torch.cat([attention_mask, attention_mask.new_ones(out.image.shape[:2])], dim=1)
        return Encoded(out.pooled, tokens, mask, slice(input_ids.shape[1], tokens.shape[1]))

    def match(self, encoded: Encoded) -> Tensor:
        """Logit that text and image belong together, (B,); ValueError if the model has no head for it."""
        if not hasattr(self.model, "cls"):
            raise ValueError(f"{self.name}: no head for matching: load the pretrained file")
        apart, together = self.model.cls.seq_relationship(encoded.pooled).unbind(dim=-1)
        return together - apart


def load(folder: Path, name: str, pretrained: bool = True) -> ClipVilBackbone:
    """A folder that `trimtab convert` or `save_pretrained` wrote; with a tokenizer if there is one in it."""
    from trimtab.backbones.clip_vil.model import ClipVilModel

    return ClipVilBackbone(name, load_pretrained(ClipVilModel, folder, pretrained), find_tokenizer(folder))
