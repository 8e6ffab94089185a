"""BridgeTower (Xu et al., AAAI 2023): two towers, and two fusion towers that read each other. transformers' class."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes

_MASK = Tap("", "input", "attention_mask")
_PASSED_ON = "what its blocks put out is handed to other towers too"


@describes("BridgeTowerModel")
def describe(model: Any) -> Anatomy:
    visual = "vision_model.visual"
    vision = Tower(
        "vision", "vision", _vision_blocks(model, f"{visual}.transformer.resblocks"), (visual,),
        output=Tap(f"{visual}.transformer.resblocks.{len(model.vision_model.visual.transformer.resblocks) - 1}"),
        samples=Tap(f"{visual}.embeddings", "input", 0),  # the stream is (L, B, D)
    )  # fmt: skip
    layers = _bert_blocks(model, "text_model.encoder.layer")
    # Bridges lead from the last blocks of both towers, from each by itself, to the fusion layers.
    text = Tower("text", "text", layers, ("text_model",), Tap(layers[-1].path), mask=_MASK, closed=_PASSED_ON)
    heads = ("text_model.pooler", "cross_modal_text_pooler", "cross_modal_image_pooler")
    fusion = (_fusion(model, "text", "image"), _fusion(model, "image", "text"))
    return Anatomy((vision, text, *fusion), heads=heads)


def _fusion(model: Any, own: str, other: str) -> Tower:
    prefix = f"cross_modal_{own}"
    blocks = _bert_blocks(model, f"{prefix}_layers")
    scope = tuple(f"{prefix}_{part}" for part in ("transform", "layernorm", "link_tower", "layers"))
    return Tower(
        f"fusion-{own}", "fusion", blocks, scope, output=Tap(blocks[-1].path), mask=_MASK if own == "text" else None,
        pooled=Tap(f"{prefix}_pooler"), memory=f"fusion-{other}",
        reads=("text" if own == "text" else "vision",), closed=_PASSED_ON,
    )  # fmt: skip


def _vision_blocks(model: Any, prefix: str) -> tuple[Block, ...]:
    blocks = []
    for i, block in enumerate(model.get_submodule(prefix)):
        path = f"{prefix}.{i}"
        blocks.append(Block(path, block.ln_1.normalized_shape[0], (
            Sublayer("attention", Tap(f"{path}.ln_1", "input"), Tap(f"{path}.attn")),
            Sublayer("mlp", Tap(f"{path}.ln_2", "input"), Tap(f"{path}.mlp.c_proj")),
        ), stream="hidden_state"))  # fmt: skip
    return tuple(blocks)


def _bert_blocks(model: Any, prefix: str) -> tuple[Block, ...]:
    """Post-norm, as in BERT: adapters of attentions are summed before the LayerNorm that follows."""
    blocks = []
    for i, layer in enumerate(model.get_submodule(prefix)):
        path = f"{prefix}.{i}"
        parts = [Sublayer("attention", Tap(f"{path}.attention", "input"), Tap(f"{path}.attention.output.dense"))]
        crosses = hasattr(layer, "crossattention")
        if crosses:
            cross = f"{path}.crossattention"
            parts.append(Sublayer("cross-attention", Tap(cross, "input"), Tap(f"{cross}.output.dense")))
        parts.append(Sublayer("mlp", Tap(f"{path}.intermediate", "input"), Tap(f"{path}.output")))
        # Fusion layers return their attention weights too: None in place of a skipped one, as this argument is.
        also = ("attentions", "cross_attentions") if crosses else ()
        blocks.append(Block(path, layer.output.dense.out_features, tuple(parts), returns_tuple=crosses, also=also))
    return tuple(blocks)
