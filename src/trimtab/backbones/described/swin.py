"""Swin (Liu et al., ICCV 2021), by itself or as the backbone of a detector. transformers' classes described."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes


@describes("SwinModel")
def describe(model: Any) -> Anatomy:
    blocks = tuple(_blocks(model, "encoder.layers"))
    tower = Tower(
        "vision", "vision", blocks, ("embeddings", "encoder", "layernorm"), output=Tap("layernorm"),
        pooled=Tap("pooler") if model.pooler is not None else None,
    )  # fmt: skip
    return Anatomy((tower,), heads=("pooler",))


@describes("SwinBackbone")
def describe_backbone(model: Any) -> Anatomy:
    """Its result is one grid of each of several stages, which go through `hidden_states_norms`."""
    blocks = tuple(_blocks(model.swin, "swin.encoder.layers"))
    scope = ("swin.embeddings", "swin.encoder", "hidden_states_norms")  # nothing reads what `swin.layernorm` gives
    return Anatomy((Tower("vision", "vision", blocks, scope, output=Tap(blocks[-1].path)),))


def _blocks(model: Any, layers: str) -> Any:
    parity = "windows are shifted in every second block, by number"
    for s, stage in enumerate(model.encoder.layers):
        for b, block in enumerate(stage.blocks):
            path = f"{layers}.{s}.blocks.{b}"
            yield Block(path, block.layernorm_before.normalized_shape[0], (
                # Attention runs on windows; it is tokens again where the path of stochastic depth begins.
                Sublayer("attention", Tap(f"{path}.layernorm_before", "input"), Tap(f"{path}.drop_path")),
                Sublayer("mlp", Tap(f"{path}.layernorm_after", "input"), Tap(f"{path}.mlp")),
            ), also=("attentions",), stays=parity)  # fmt: skip
