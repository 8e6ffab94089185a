"""BART (Lewis et al., ACL 2020): a text encoder, and a decoder that reads it. transformers' class described."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes


@describes("BartModel")
def describe(model: Any) -> Anatomy:
    return Anatomy((_tower(model, "encoder"), _tower(model, "decoder")))


def _tower(model: Any, name: str) -> Tower:
    decodes = name == "decoder"
    blocks = tuple(
        Block(f"{name}.layers.{i}", model.config.d_model, tuple(_sublayers(f"{name}.layers.{i}", decodes)))
        for i in range(len(getattr(model, name).layers))
    )
    return Tower(
        name, "text", blocks, (name,), output=Tap(blocks[-1].path), mask=Tap(name, "input", "attention_mask"),
        memory="encoder" if decodes else None, causal=decodes,
    )  # fmt: skip


def _sublayers(path: str, decodes: bool) -> Any:
    """Post-norm: as in `bert`, an attention's adapter is summed before the norm that follows, an MLP's after it."""
    yield Sublayer("attention", Tap(f"{path}.self_attn", "input"), Tap(f"{path}.self_attn"))
    if decodes:
        yield Sublayer("cross-attention", Tap(f"{path}.encoder_attn", "input"), Tap(f"{path}.encoder_attn"))
    yield Sublayer("mlp", Tap(f"{path}.fc1", "input"), Tap(f"{path}.final_layer_norm"))
