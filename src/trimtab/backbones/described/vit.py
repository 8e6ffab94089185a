"""Vision transformers by themselves: ViT and DINO (Caron et al., ICCV 2021), which has its class, and DINOv2."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes


@describes("ViTModel")
def describe_vit(model: Any) -> Anatomy:
    blocks = []
    for i in range(len(model.layers)):
        path = f"layers.{i}"
        blocks.append(Block(path, model.config.hidden_size, (
            Sublayer("attention", Tap(f"{path}.layernorm_before", "input"), Tap(f"{path}.attention")),
            Sublayer("mlp", Tap(f"{path}.layernorm_after", "input"), Tap(f"{path}.mlp")),
        )))  # fmt: skip
    tower = Tower(
        "vision", "vision", tuple(blocks), ("embeddings", "layers", "layernorm"), output=Tap("layernorm"),
        pooled=Tap("pooler") if model.pooler is not None else None,
    )  # fmt: skip
    return Anatomy((tower,), heads=("pooler",))


@describes("Dinov2Model", "Dinov2Backbone")
def describe_dinov2(model: Any) -> Anatomy:
    blocks = []
    for i in range(len(model.encoder.layer)):
        path = f"encoder.layer.{i}"
        blocks.append(Block(path, model.config.hidden_size, (
            # Each part's result is scaled before it is summed into the stream.
            Sublayer("attention", Tap(f"{path}.norm1", "input"), Tap(f"{path}.layer_scale1")),
            Sublayer("mlp", Tap(f"{path}.norm2", "input"), Tap(f"{path}.layer_scale2")),
        )))  # fmt: skip
    scope = ("embeddings", "encoder", "layernorm")
    return Anatomy((Tower("vision", "vision", tuple(blocks), scope, output=Tap("layernorm")),))
