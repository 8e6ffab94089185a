"""The anatomy of CLIP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes, part_of


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
