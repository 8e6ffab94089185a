"""The anatomy of ViLT."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes


@describes("ViltModel")
def describe(model: Any) -> Anatomy:
    width = model.config.hidden_size
    blocks = []
    for i in range(len(model.encoder.layer)):
        path = f"encoder.layer.{i}"
        blocks.append(Block(path, width, (
            # The norms come first in ViLT, so the input of each norm is the un-normalised stream.
            Sublayer("attention", Tap(f"{path}.layernorm_before", "input"), Tap(f"{path}.attention.output")),
            Sublayer("mlp", Tap(f"{path}.layernorm_after", "input"), Tap(f"{path}.output")),
        ), returns_tuple=True))  # fmt: skip
    tower = Tower(
        "fusion", "fusion", tuple(blocks), ("embeddings", "encoder", "layernorm"),
        output=Tap("layernorm"), mask=Tap("embeddings", key=1),
        mask_source=Tap("", "input", "attention_mask"), pooled=Tap("pooler") if model.pooler else None,
    )  # fmt: skip
    return Anatomy((tower,), heads=("pooler",))
