"""SigLIP for tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.backbones.base import Backbone, Encoded, Pictures, find_tokenizer, load_pretrained
from trimtab.backbones.clip.features import ClipBackbone
from trimtab.backbones.processed import cut_into_tiles, read_pictures


class SiglipBackbone(ClipBackbone):
    """Texts are padded to the length at which it was trained, on the side that its tokenizer pads: padding is text to
    it, its vector is the last place's.

    SigLIP 2 models that take pictures of any shape (`Siglip2Model`) are given squares of as many patches as they have
    positions, with the mean and deviation of the folder's processor.
    """

    def texts(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        """Strings -> `input_ids` and `attention_mask` (B, L), cut at `max_text` tokens, padded to all positions."""
        if self.tokenizer is None:
            return super().texts(sentences)  # which says what is missing
        cut = self.tokenizer(list(sentences), truncation=True, max_length=self.max_text)["input_ids"]
        ids = torch.full((len(cut), self.positions), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, words in enumerate(cut):
            first = self.positions - len(words) if self.tokenizer.padding_side == "left" else 0
            ids[row, first : first + len(words)] = torch.tensor(words, dtype=torch.long)
            mask[row, first : first + len(words)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    @property
    def positions(self) -> int:
        """Tokens of every text, padding among them."""
        return self.model.config.text_config.max_position_embeddings

    def limit_text(self, tokens: int) -> None:
        """Cut texts at so many tokens; they are as long as before."""
        self.max_text = min(tokens, self.positions)

    def example(self, batch: int = 1, text_tokens: int | None = None) -> dict[str, Tensor]:
        return super().example(batch, text_tokens or self.positions)

    def image(self, pixel_values: Tensor) -> Encoded:
        if not hasattr(self.model.config.vision_config, "num_patches"):
            return super().image(pixel_values)
        patches, side = patched(pixel_values, self.model.config.vision_config.patch_size)
        count, device = len(patches), patches.device
        out = self.model.get_image_features(
            pixel_values=patches, pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=device),
            spatial_shapes=torch.tensor([[side, side]] * count, device=device),
        )  # fmt: skip
        return Encoded(out.pooler_output, out.last_hidden_state)

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        out = self.model.get_text_features(input_ids=input_ids)
        return Encoded(out.pooler_output, out.last_hidden_state, attention_mask)

    def fold_projections(self, image: Tensor, text: Tensor, scale: Tensor) -> None:
        Backbone.fold_projections(self, image, text, scale)


def patched(pixel_values: Tensor, patch: int) -> tuple[Tensor, int]:
    """Squares (B, 3, S, S) as rows of patches (B, (S / p)^2, p p 3), a patch's rows first, colours last; and S / p."""
    rows = pixel_values.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, n, n, p, p)
    return rows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2), rows.shape[2]


def load(folder: Path, name: str, pretrained: bool = True) -> SiglipBackbone:
    """A transformers folder of SigLIP or SigLIP 2: config.json, model.safetensors, the tokenizer's files if any."""
    from transformers import Siglip2Model, SiglipModel
    from transformers.models.auto.configuration_auto import AutoConfig

    kind = Siglip2Model if AutoConfig.from_pretrained(folder).model_type == "siglip2" else SiglipModel
    model = load_pretrained(kind, folder, pretrained)
    config: Any = model.config
    vision, text = config.vision_config, config.text_config
    flexible = getattr(vision, "num_patches", None)
    size = vision.patch_size * round(flexible**0.5) if flexible else vision.image_size
    width = getattr(text, "projection_size", None) or text.hidden_size
    pictures = read_pictures(folder, size, Pictures(size), tiles=bool(flexible))
    found = SiglipBackbone(name, model, find_tokenizer(folder), pictures, width, text.max_position_embeddings)
    found.side, found.processor_files = size, cut_into_tiles(folder, pictures)
    return found
