"""CLIP (Radford et al., ICML 2021): two towers that meet in one space. transformers' classes, and our `tiny-clip`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes
from trimtab.backbones.base import BACKBONES, WEIGHTS, Backbone, Encoded, Pictures, load_pretrained


@describes("CLIPModel")
def describe(model: Any) -> Anatomy:
    vision = Tower(
        "vision", "vision", tower_blocks(model.vision_model, "vision_model"), ("vision_model",),
        output=Tap(f"vision_model.encoder.layers.{len(model.vision_model.encoder.layers) - 1}"),
        pooled=Tap("visual_projection"), pooled_token="first",
    )  # fmt: skip
    text = Tower(
        "text", "text", tower_blocks(model.text_model, "text_model"), ("text_model",),
        output=Tap("text_model.final_layer_norm"),
        mask=Tap("text_model", "input", "attention_mask"), pooled=Tap("text_projection"), pooled_token="last",
        causal=True,
    )  # fmt: skip
    return Anatomy((vision, text), heads=("visual_projection", "text_projection"))


def tower_blocks(tower: Any, prefix: str) -> tuple[Block, ...]:
    """The pre-norm layers under `<prefix>.encoder.layers` of transformers' CLIP towers."""
    blocks = []
    for i, layer in enumerate(tower.encoder.layers):
        path = f"{prefix}.encoder.layers.{i}"
        blocks.append(Block(path, layer.embed_dim, (
            Sublayer("attention", Tap(f"{path}.layer_norm1", "input"), Tap(f"{path}.self_attn")),
            Sublayer("mlp", Tap(f"{path}.layer_norm2", "input"), Tap(f"{path}.mlp")),
        )))  # fmt: skip
    return tuple(blocks)


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


def load(folder: Path, name: str, pretrained: bool = True) -> ClipBackbone:
    """A transformers CLIP folder: config.json, model.safetensors, the tokenizer's files."""
    from transformers import AutoTokenizer, CLIPModel

    model = load_pretrained(CLIPModel, folder, pretrained)
    config = model.config
    return ClipBackbone(name, model, AutoTokenizer.from_pretrained(folder), Pictures(config.vision_config.image_size),
                        config.projection_dim, config.text_config.max_position_embeddings)  # fmt: skip


@BACKBONES.register("tiny-clip")
def tiny_clip(pretrained: bool = True) -> ClipBackbone:
    """8 vision and 4 text blocks, 128 wide, 64 px, patch 8; pretrained by us on Twemoji (docs/pretraining.md)."""
    return load(WEIGHTS / "tiny-clip", "tiny-clip", pretrained)
