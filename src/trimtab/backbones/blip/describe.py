"""The anatomy of BLIP: of transformers' classes, and of ours."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes

_TEXTS = {"text_model": "text", "text_encoder": "text", "text_decoder": "decoder"}  # attribute -> name of the tower


@describes("BlipForConditionalGeneration", "BlipForImageTextRetrieval", "BlipForQuestionAnswering", "BlipModel")
def describe(model: Any) -> Anatomy:
    layers = model.vision_model.encoder.layers
    towers = [Tower(
        "vision", "vision", tuple(vision_block(f"vision_model.encoder.layers.{i}", layer.embed_dim)
                                  for i, layer in enumerate(layers)),
        # Not the norm behind it: BLIP calls that twice, on the tokens and again on the first of them.
        ("vision_model",), output=Tap(f"vision_model.encoder.layers.{len(layers) - 1}"),
    )]  # fmt: skip
    for attribute, name in _TEXTS.items():
        text = getattr(model, attribute, None)
        if text is None:
            continue
        path = f"{attribute}.bert" if hasattr(text, "bert") else attribute
        alone = attribute == "text_model"  # BlipModel's, whose layers have a cross-attention that it never calls
        blocks = tuple(
            _text_block(f"{path}.encoder.layer.{i}", model.config.text_config.hidden_size,
                        hasattr(b, "crossattention") and not alone)
            for i, b in enumerate(model.get_submodule(path).encoder.layer)
        )  # fmt: skip
        # MULTIFLOW counts BLIP's encoder and decoder to one modality. A decoder of answers reads the question, which
        # has read the picture.
        memory = "text" if name == "decoder" and hasattr(model, "text_encoder") else None if alone else "vision"
        towers.append(Tower(name, "text", blocks, (f"{path}.embeddings", f"{path}.encoder"), Tap(blocks[-1].path),
                            mask=Tap(path, "input", "attention_mask"), memory=memory,
                            causal=name == "decoder"))  # fmt: skip
    return Anatomy(tuple(towers), heads=_heads(model))


def _heads(model: Any) -> tuple[str, ...]:
    known = ("visual_projection", "text_projection", "vision_proj", "text_proj", "itm_head", "text_decoder.cls",
             "text_model.pooler")  # fmt: skip
    there = {name for name, _ in model.named_modules()}
    return tuple(name for name in known if name in there)


def vision_block(path: str, width: int) -> Block:
    return Block(path, width, (
        Sublayer("attention", Tap(f"{path}.layer_norm1", "input"), Tap(f"{path}.self_attn")),
        Sublayer("mlp", Tap(f"{path}.layer_norm2", "input"), Tap(f"{path}.mlp")),
    ))  # fmt: skip


def _text_block(path: str, width: int, crosses: bool) -> Block:
    parts = [Sublayer("attention", Tap(f"{path}.attention", "input"), Tap(f"{path}.attention.output.dense"))]
    if crosses:
        cross = f"{path}.crossattention"
        parts.append(Sublayer("cross-attention", Tap(cross, "input"), Tap(f"{cross}.output.dense")))
    parts.append(Sublayer("mlp", Tap(f"{path}.intermediate", "input"), Tap(f"{path}.output")))
    return Block(path, width, tuple(parts))


@describes("BlipPretraining", "BlipForNlvr2")
def describe_own(model: Any) -> Anatomy:
    """Vision; and text, to which MULTIFLOW counts encoder and decoder together.

    The shared parts of the decoder are the encoder's own modules, so that its blocks are described without adapters:
    what is done to the encoder is done there too.
    """
    vision = tuple(vision_block(f"vision_model.encoder.layers.{i}", layer.embed_dim)
                   for i, layer in enumerate(model.vision_model.encoder.layers))  # fmt: skip
    # Not the norm behind it: BLIP calls that on the tokens and once more on the first of them.
    towers = [Tower("vision", "vision", vision, ("vision_model",), output=Tap(vision[-1].path))]
    for name, path in (("text", "text_encoder"), ("decoder", "text_decoder.bert")):
        if name == "decoder" and not hasattr(model, "text_decoder"):
            continue
        layers = model.get_submodule(path).encoder.layer
        width = model.config.text_config.hidden_size
        twin = hasattr(layers[0].crossattention, "self0")
        blocks = tuple(
            _own_text_block(f"{path}.encoder.layer.{i}", width, twin, name == "text") for i in range(len(layers))
        )
        scope = (f"{path}.embeddings", f"{path}.encoder")
        towers.append(Tower(name, "text", blocks, scope, output=Tap(blocks[-1].path), memory="vision",
                            mask=Tap(path, "input", "attention_mask"), causal=name == "decoder"))  # fmt: skip
    heads = ("vision_proj", "text_proj", "itm_head", "text_decoder.cls", "cls_head")
    return Anatomy(tuple(towers), heads=tuple(h for h in heads if hasattr(model, h.split(".")[0])))


def _own_text_block(path: str, width: int, twin: bool, own: bool) -> Block:
    cross = f"{path}.crossattention"
    # With two pictures the value before the norm is the sum of two maps: an adapter is added to the first of them.
    write = Tap(f"{cross}.output.dense0") if twin else Tap(f"{cross}.output.dense")
    parts = (
        Sublayer("attention", Tap(f"{path}.attention", "input"), Tap(f"{path}.attention.output.dense")),
        Sublayer("cross-attention", Tap(cross, "input"), write),
        Sublayer("mlp", Tap(f"{path}.intermediate", "input"), Tap(f"{path}.output")),
    )
    return Block(path, width, parts if own else parts[:1])
