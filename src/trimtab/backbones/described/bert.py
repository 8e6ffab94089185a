"""BERT (Devlin et al., NAACL 2019), a text tower by itself or inside a dual encoder: transformers' class described."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes


@describes("BertModel")
def describe(model: Any) -> Anatomy:
    width = model.config.hidden_size
    blocks = []
    for i in range(len(model.encoder.layer)):
        path = f"encoder.layer.{i}"
        blocks.append(Block(path, width, (
            # Post-norm: an attention adapter is summed before the LayerNorm that follows, one at the feed-forward part
            # after it, as DAS sets them in METER's BERT-like layers.
            Sublayer("attention", Tap(f"{path}.attention", "input"), Tap(f"{path}.attention.output.dense")),
            Sublayer("mlp", Tap(f"{path}.intermediate", "input"), Tap(f"{path}.output")),
        )))  # fmt: skip
    tower = Tower(
        "text", "text", tuple(blocks), ("embeddings", "encoder"),
        output=Tap(blocks[-1].path), mask=Tap("", "input", "attention_mask"),
        pooled=Tap("pooler") if model.pooler is not None else None,
    )  # fmt: skip
    return Anatomy((tower,), heads=("pooler",))
