"""CLIP-ViL for tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.backbones.base import CLIP_MEAN, CLIP_STD, Backbone, Encoded, Pictures, find_tokenizer, load_pretrained
from trimtab.backbones.pictures import Bounded, extents
from trimtab.backbones.processed import own_pictures

STEP = 32  # pixels of a place


class ClipVilBackbone(Backbone):
    """A CLIP-ViL: text and places of the picture in one sequence, text first."""

    kind = "joint"
    reads_padding = True

    def __init__(self, name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None):
        text = model.config.text_config
        # As in the authors' fine-tuning: shorter side 384, longer one at most 640, in a black frame of these sides. Of
        # a batch that holds frames of both ways they cut some off; here each is seen whole, and by itself.
        reach = 32 * model.config.positions
        pictures = pictures or Bounded(min(384, reach), CLIP_MEAN, CLIP_STD, min(640, reach), canvas=True)
        super().__init__(name, model, tokenizer, pictures, text.hidden_size, min(text.max_position_embeddings, 20))

    def look(self, pixel_values: Tensor) -> Tensor:
        """Embedded places of the pictures, (B, h*w, D); rows of zeros for padding, which is looked at by nobody."""
        shapes = extents(pixel_values, STEP)
        if shapes is None:
            return self.model.look(pixel_values)
        high, wide = pixel_values.shape[2] // STEP, pixel_values.shape[3] // STEP
        rows: list[Tensor] = [pixel_values] * len(shapes)
        for rows_there, columns in set(shapes):
            which = [i for i, shape in enumerate(shapes) if shape == (rows_there, columns)]
            part = self.model.look(pixel_values[which, :, : rows_there * STEP, : columns * STEP])
            grid = part.unflatten(1, (rows_there, columns)).permute(0, 3, 1, 2)
            padded = F.pad(grid, (0, wide - columns, 0, high - rows_there)).flatten(2).transpose(1, 2)
            for i, row in zip(which, padded, strict=True):
                rows[i] = row
        return torch.stack(rows)

    def grid(self, pixel_values: Tensor) -> tuple[int, int]:
        return pixel_values.shape[2] // STEP, pixel_values.shape[3] // STEP

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """`pair` of what `look` returned."""
        there = (seen != 0).any(dim=-1).to(attention_mask.dtype)
        out = self.model(seen=seen, input_ids=input_ids, attention_mask=attention_mask, image_mask=there)
        tokens = torch.cat([out.text, out.image], dim=1)  # (B, L + h*w, D)
        mask = torch.cat([attention_mask, there], dim=1)
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

    model = load_pretrained(ClipVilModel, folder, pretrained)
    return ClipVilBackbone(name, model, find_tokenizer(folder), own_pictures(folder))
