"""The anatomy of X-VLM."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Modality, Sublayer, Tap, Tower, describes
from trimtab.backbones.clip import describe as clip


@describes("Xvlm")
def describe(model: Any) -> Anatomy:
    towers = [_vision(model.vision_encoder)]
    if model.config.task != "caption":
        towers += _text(model.text_encoder.bert, "text_encoder.bert", "")
    if model.config.task in ("caption", "vqa"):
        # The decoder starts as BERT's layers, those of an answer as the fusing ones: it keeps their modalities.
        towers += _text(model.text_decoder.bert, "text_decoder.bert", "decoder" if model.config.task == "vqa" else "")
    heads = ("vision_proj", "text_proj", "itm_head", "bbox_head", "cls_head", "text_encoder.cls", "text_decoder.cls")
    return Anatomy(tuple(towers), heads=tuple(h for h in heads if _has(model, h)))


def _has(model: Any, path: str) -> bool:
    try:
        return model.get_submodule(path) is not None
    except AttributeError:
        return False


def _vision(tower: Any) -> Tower:
    if type(tower).__name__ == "ClipTower":
        blocks = clip.tower_blocks(tower, "vision_encoder")
        return Tower("vision", "vision", blocks, ("vision_encoder",), output=Tap("vision_encoder.post_layernorm"))
    parts = []
    for s, stage in enumerate(tower.encoder.layers):
        for b, block in enumerate(stage.blocks):
            path = f"vision_encoder.encoder.layers.{s}.blocks.{b}"
            width = block.layernorm_before.normalized_shape[0]
            # Attention runs on windows, whose output has another shape than the stream: nothing to add to it there.
            mlp = Sublayer("mlp", Tap(f"{path}.layernorm_after", "input"), Tap(f"{path}.mlp"))
            parts.append(Block(path, width, (mlp,), returns_tuple=True))
    return Tower("vision", "vision", tuple(parts), ("vision_encoder",), output=Tap("vision_encoder.layernorm"))


def _text(model: Any, path: str, name: str) -> list[Tower]:
    """The layers that see no image as a text tower, the others as a fusion tower (MULTIFLOW's split)."""
    towers: list[Tower] = []
    layers, split = len(model.encoder.layer), model.fusion
    kinds: tuple[tuple[Modality, range], ...] = (("text", range(split)), ("fusion", range(split, layers)))
    for modality, numbers in kinds:
        if not numbers:
            continue
        blocks = tuple(_block(model.encoder.layer[i], f"{path}.encoder.layer.{i}") for i in numbers)
        # What is neither in a layer nor a head belongs to the text: embeddings are not pruned, but counted.
        scope = [b.path for b in blocks] + ([f"{path}.embeddings"] if numbers[0] == 0 else [])
        towers.append(Tower(
            name or modality, modality, blocks, tuple(scope), output=Tap(blocks[-1].path),
            mask=Tap(path, "input", "attention_mask"), causal=model.causal,
            memory=None if modality == "text" else "fusion" if name else "vision",
            reads=("text",) if modality == "fusion" and towers else (),
        ))  # fmt: skip
    return towers


def _block(layer: Any, path: str) -> Block:
    sublayers = [Sublayer("attention", Tap(f"{path}.attention", "input"), Tap(f"{path}.attention.output.dense"))]
    if hasattr(layer, "crossattention"):
        read, write = Tap(f"{path}.crossattention", "input"), Tap(f"{path}.crossattention.output.dense")
        sublayers.append(Sublayer("cross-attention", read, write))
    sublayers.append(Sublayer("mlp", Tap(f"{path}.intermediate", "input"), Tap(f"{path}.output")))
    return Block(path, layer.attention.output.dense.out_features, tuple(sublayers))
