"""Grounding DINO (Liu et al., ECCV 2024): finds what a text names in a picture. transformers' class described.

image (B, 3, H, W) -> Swin -> grids of several sizes -> (B, P, D) --+    in each encoder layer: image and text attend to
text (B, L) -> BERT -> (B, L, D) -----------------------------------+--> each other, then the image's deformable block
                                                                    |    and the text's block
queries (B, Q, D) -> decoder, which reads the encoded text and image -> boxes, and which words

An encoder layer is not one block, since it returns a pair of streams: its image half and its text half are blocks of
two fusion towers, and the attention between them belongs to both, each map to the side that it reads or writes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes, part_of

_HALF = "it is one half of an encoder layer, whose other half needs it in its place"
_PLACES = "each has a place in the picture, around which deformable attention samples"
_PHRASES = "each belongs to a phrase, and the image attends to them between these blocks"
_REFINES = "the boxes are refined once after each decoder layer, with a head of the same number"


@describes("GroundingDinoModel")
def describe(model: Any) -> Anatomy:
    vision = part_of(model, "backbone.conv_encoder.model", "vision")
    (eye,) = vision.towers
    text = part_of(model, "text_backbone", "text")
    (words,) = text.towers
    # BERT is handed masks (B, 1, L, L) that keep the phrases of a text apart: the tokens' own is seen before them.
    words = replace(words, mask=Tap("", "input", "attention_mask"))
    image, phrases = replace(_image(model), reads=("vision",)), replace(_text(model), reads=("text",))
    towers = (eye, words, image, phrases, _decoder(model))
    own = ("backbone", "text_backbone", "encoder", "decoder")
    heads = [n for n, _ in model.named_children() if n not in own] + ["decoder.reference_points_head"]
    heads += ["decoder.bbox_embed", *vision.heads, *text.heads]
    return Anatomy(towers, heads=tuple(heads))


@describes("GroundingDinoForObjectDetection")
def describe_detector(model: Any) -> Anatomy:
    inner = describe(model.model).prefixed("model")
    # It makes up a mask of ones for texts without one.
    given = Tap("", "input", "attention_mask")
    towers = tuple(replace(t, mask_source=given) if t.name in ("text", "fusion-text") else t for t in inner.towers)
    return replace(inner, towers=towers, heads=(*inner.heads, "bbox_embed", "class_embed"))


def _image(model: Any) -> Tower:
    blocks = []
    for i in range(len(model.encoder.layers)):
        path = f"encoder.layers.{i}.deformable_layer"
        blocks.append(Block(path, model.config.d_model, (
            Sublayer("attention", Tap(f"{path}.self_attn", "input", "hidden_states"), Tap(f"{path}.self_attn")),
            Sublayer("mlp", Tap(f"{path}.fc1", "input"), Tap(f"{path}.final_layer_norm")),
        ), also=("attentions",), stays=_HALF))  # fmt: skip
    mask = Tap(blocks[0].path, "input", "attention_mask")
    return Tower("fusion-image", "fusion", tuple(blocks), _scope(model, "vision") + _paths(blocks),
                 output=Tap(blocks[-1].path), mask=mask, closed=_PLACES)  # fmt: skip


def _text(model: Any) -> Tower:
    blocks = []
    for i in range(len(model.encoder.layers)):
        path = f"encoder.layers.{i}.text_enhancer_layer"
        blocks.append(Block(path, model.config.d_model, (
            Sublayer("attention", Tap(f"{path}.self_attn", "input", "values"), Tap(f"{path}.self_attn")),
            Sublayer("mlp", Tap(f"{path}.fc1", "input"), Tap(f"{path}.layer_norm_after")),
        ), also=("attentions",), stays=_HALF))  # fmt: skip
    mask = Tap("", "input", "attention_mask")
    return Tower("fusion-text", "fusion", tuple(blocks), _scope(model, "text") + _paths(blocks),
                 output=Tap(blocks[-1].path), mask=mask, closed=_PHRASES)  # fmt: skip


def _paths(blocks: list[Block]) -> tuple[str, ...]:
    return tuple(b.path for b in blocks)


def _scope(model: Any, side: str) -> tuple[str, ...]:
    """What one side has in the attentions between image and text."""
    attention = (f"{side}_proj", f"values_{side}_proj", f"out_{side}_proj")
    parts = (f"{side}_param", f"layer_norm_{side}", *(f"attn.{name}" for name in attention))
    return tuple(f"encoder.layers.{i}.fusion_layer.{p}" for i in range(len(model.encoder.layers)) for p in parts)


def _decoder(model: Any) -> Tower:
    blocks = []
    for i in range(len(model.decoder.layers)):
        path = f"decoder.layers.{i}"
        blocks.append(Block(path, model.config.d_model, (
            Sublayer("attention", Tap(f"{path}.self_attn", "input", "values"), Tap(f"{path}.self_attn")),
            Sublayer("cross-attention", Tap(f"{path}.self_attn_layer_norm"), Tap(f"{path}.encoder_attn_text")),
            Sublayer("cross-attention", Tap(f"{path}.encoder_attn", "input", "hidden_states"),
                     Tap(f"{path}.encoder_attn")),
            Sublayer("mlp", Tap(f"{path}.fc1", "input"), Tap(f"{path}.final_layer_norm")),
        ), returns_tuple=True, stays=_REFINES))  # fmt: skip
    return Tower("decoder", "fusion", tuple(blocks), ("decoder",), output=Tap(blocks[-1].path), memory="fusion-image",
                 memories=(("text_encoder_hidden_states", "fusion-text"),), closed=_PLACES)  # fmt: skip
