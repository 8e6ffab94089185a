"""The anatomy of SigLIP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.anatomy import Anatomy, Tap, Tower, describes, part_of
from trimtab.backbones.clip.describe import tower_blocks


@describes("SiglipVisionModel", "Siglip2VisionModel")
def describe_vision(model: Any) -> Anatomy:
    tower = Tower(
        "vision", "vision", tower_blocks(model), ("embeddings", "encoder", "post_layernorm"),
        output=Tap("post_layernorm"), pooled=Tap("head") if model.use_head else None,
    )  # fmt: skip
    if type(model).__name__.startswith("Siglip2"):  # pictures of any shape, as padded rows of patches
        tower = replace(tower, mask=Tap("", "input", "pixel_attention_mask"))
    return Anatomy((tower,), heads=("head",))


@describes("SiglipTextModel", "Siglip2TextModel")
def describe_text(model: Any) -> Anatomy:
    tower = Tower(
        "text", "text", tower_blocks(model), ("embeddings", "encoder", "final_layer_norm"),
        output=Tap("final_layer_norm"), mask=Tap("", "input", "attention_mask"),
        mask_required=False,  # it was trained on padded texts without a mask: padding is text to it
        pooled=Tap("head"), pooled_token="last",
    )  # fmt: skip
    return Anatomy((tower,), heads=("head",))


@describes("SiglipModel", "Siglip2Model")
def describe(model: Any) -> Anatomy:
    parts = [part_of(model, f"{name}_model", name) for name in ("vision", "text")]
    return Anatomy(tuple(t for p in parts for t in p.towers), heads=tuple(h for p in parts for h in p.heads))
