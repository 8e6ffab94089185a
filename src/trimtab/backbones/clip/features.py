"""CLIP (Radford et al., ICML 2021): two towers that meet in one space. transformers' classes, and our `tiny-clip`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes, part_of
from trimtab.backbones.base import BACKBONES, WEIGHTS, Backbone, Encoded, load_pretrained, read_pictures


@describes("CLIPModel")
def describe(model: Any) -> Anatomy:
    (vision,), (text,) = part_of(model, "vision_model", "vision").towers, part_of(model, "text_model", "text").towers
    towers = (
        replace(vision, pooled=Tap("visual_projection"), scope=("vision_model",)),
        replace(text, pooled=Tap("text_projection"), scope=("text_model",)),
    )
    return Anatomy(towers, heads=("visual_projection", "text_projection"))


@describes("CLIPVisionModel")
def describe_vision(model: Any) -> Anatomy:
    blocks = tower_blocks(model)
    scope = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
    return Anatomy((Tower("vision", "vision", blocks, scope, output=Tap(blocks[-1].path)),))


@describes("CLIPTextModel")
def describe_text(model: Any) -> Anatomy:
    tower = Tower(
        "text", "text", tower_blocks(model), ("embeddings", "encoder", "final_layer_norm"),
        output=Tap("final_layer_norm"), mask=Tap("", "input", "attention_mask"), pooled_token="last", causal=True,
    )  # fmt: skip
    return Anatomy((tower,))


def tower_blocks(tower: Any, prefix: str = "") -> tuple[Block, ...]:
    """The pre-norm blocks of one of CLIP's or SigLIP's towers, which the described model holds under a prefix."""
    blocks = []
    for i, layer in enumerate(tower.encoder.layers):
        path = f"{prefix}.encoder.layers.{i}".lstrip(".")
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
    from transformers import AutoTokenizer, CLIPModel

    model = load_pretrained(CLIPModel, folder, pretrained)
    config = model.config
    pictures = read_pictures(folder, config.vision_config.image_size)
    return ClipBackbone(name, model, AutoTokenizer.from_pretrained(folder), pictures, config.projection_dim,
                        config.text_config.max_position_embeddings)  # fmt: skip


@BACKBONES.register("tiny-clip")
def tiny_clip(pretrained: bool = True) -> ClipBackbone:
    """8 vision and 4 text blocks, 128 wide, 64 px, patch 8; pretrained by us on Twemoji (docs/pretraining.md)."""
    return load(WEIGHTS / "tiny-clip", "tiny-clip", pretrained)
