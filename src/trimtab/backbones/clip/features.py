"""CLIP for tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.backbones.base import WEIGHTS, Backbone, Encoded, find_tokenizer, load_pretrained
from trimtab.backbones.pictures import CLIP_MEAN, CLIP_STD, Cropped
from trimtab.backbones.processed import read_pictures


class ClipBackbone(Backbone):
    kind = "dual"

    def image(self, pixel_values: Tensor) -> Encoded:
        out = self.model.get_image_features(pixel_values=pixel_values)
        return Encoded(out.pooler_output, out.last_hidden_state)

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        out = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        return Encoded(out.pooler_output, out.last_hidden_state, attention_mask)

    @torch.no_grad()
    def fold_projections(self, image: Tensor, text: Tensor, scale: Tensor) -> None:
        """Put linear maps that follow the projections, (E, E) each, into them, and set the scale."""
        model = self.model
        model.visual_projection.weight.copy_(image @ model.visual_projection.weight)
        model.text_projection.weight.copy_(text @ model.text_projection.weight)
        model.logit_scale.copy_(scale)

    @property
    def logit_scale(self) -> Tensor:
        """Natural logarithm of the factor by which cosines are multiplied, a scalar parameter."""
        return self.model.logit_scale


class Start(NamedTuple):
    """Embeddings for a vision transformer that does not normalise them before its first block.

    Attributes:
        patch: weight of the patch embedding, (D, 3, P, P).
        bias: its bias, (D,).
        positions: position embeddings, (1 + N, D); that of the class token is 0.
        token: class token, its position included, (D,).
    """

    patch: Tensor
    bias: Tensor
    positions: Tensor
    token: Tensor


@torch.no_grad()
def without_pre_norm(vision: Any) -> Start:
    """CLIP normalises its embeddings before the first block, ViLT and BLIP do not: the mean and the scale of that norm
    are put into the embeddings, exactly for the class token, on average over flat random colours for patches."""
    patch, position = vision.embeddings.patch_embedding.weight, vision.embeddings.position_embedding.weight
    norm = vision.pre_layrnorm
    colours = torch.rand(512, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    flat = nn.functional.conv2d(colours.expand(-1, -1, *patch.shape[2:]), patch).flatten(1)  # (512, D)
    scale = norm.weight / flat.std(dim=1).mean()
    positions = torch.cat([torch.zeros_like(position[:1]), (position[1:] * scale) + norm.bias])
    centred = patch - patch.mean(dim=0, keepdim=True)  # a LayerNorm takes the mean over channels away
    token = norm(vision.embeddings.class_embedding + position[0])
    return Start(centred * scale[:, None, None, None], torch.zeros_like(scale), positions, token)


def load(folder: Path, name: str, pretrained: bool = True) -> ClipBackbone:
    """A transformers CLIP folder: config.json, model.safetensors, the tokenizer's files."""
    from transformers import CLIPModel

    model = load_pretrained(CLIPModel, folder, pretrained)
    config: Any = model.config
    side = config.vision_config.image_size
    pictures = read_pictures(folder, side, Cropped(side, CLIP_MEAN, CLIP_STD))
    found = ClipBackbone(name, model, find_tokenizer(folder), pictures, config.projection_dim,
                         config.text_config.max_position_embeddings)  # fmt: skip
    found.side = side
    return found


def tiny_clip(pretrained: bool = True) -> ClipBackbone:
    """8 vision and 4 text blocks, 128 wide, 64 px, patch 8; pretrained by us on drawn scenes (docs/pretraining.md)."""
    return load(WEIGHTS / "tiny-clip", "tiny-clip", pretrained)
