"""The anatomy of CLIP4Clip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes
from trimtab.backbones.clip import describe as clip


@describes("Clip4Clip")
def describe(model: Any) -> Anatomy:
    anatomy = clip.describe(model.clip).prefixed("clip")
    towers, heads = anatomy.towers, anatomy.heads
    if model.config.head == "seqTransf":
        towers += (_tower("frames", "vision", model.transformerClip, "transformerClip", ("vision",)),)
        heads += ("frame_position_embeddings",)
    if model.config.head == "tightTransf":
        towers += (_tower("cross", "fusion", model.cross.transformer, "cross.transformer", ("vision", "text")),)
        heads += ("cross.embeddings", "cross.pooler", "similarity_dense")
    if model.config.head == "seqLSTM":
        heads += ("frame_position_embeddings", "lstm_visual")
    return replace(anatomy, towers=towers, heads=heads)


def _tower(name: str, modality: Any, encoder: Any, path: str, reads: tuple[str, ...]) -> Tower:
    blocks = []
    for i, layer in enumerate(encoder.layers):
        at = f"{path}.layers.{i}"
        blocks.append(Block(at, layer.embed_dim, (
            Sublayer("attention", Tap(f"{at}.layer_norm1", "input"), Tap(f"{at}.self_attn")),
            Sublayer("mlp", Tap(f"{at}.layer_norm2", "input"), Tap(f"{at}.mlp")),
        )))  # fmt: skip
    return Tower(name, modality, tuple(blocks), (path,), output=Tap(blocks[-1].path), reads=reads)
