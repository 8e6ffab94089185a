"""Vision towers whose tokens a language model reads among its own: LLaVA (Liu et al., NeurIPS 2023) and Qwen-VL.

The projector between them is never pruned. Image tokens count in the language tower: the mask of valid tokens has them.
"""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes, part_of


@describes("LlavaModel")
def describe_llava(model: Any) -> Anatomy:
    vision, text = part_of(model, "vision_tower", "vision"), part_of(model, "language_model", "text")
    return Anatomy(vision.towers + text.towers, heads=("multi_modal_projector", *vision.heads, *text.heads))


@describes("Qwen2VLModel", "Qwen2_5_VLModel")
def describe_qwen(model: Any) -> Anatomy:
    vision, text = part_of(model, "visual", "vision"), part_of(model, "language_model", "text")
    return Anatomy(vision.towers + text.towers, heads=(*vision.heads, *text.heads))


@describes("Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel")
def describe_qwen_vision(model: Any) -> Anatomy:
    blocks = []
    for i, block in enumerate(model.blocks):
        path = f"blocks.{i}"
        blocks.append(Block(path, block.attn.proj.out_features, (
            Sublayer("attention", Tap(f"{path}.norm1", "input"), Tap(f"{path}.attn")),
            Sublayer("mlp", Tap(f"{path}.norm2", "input"), Tap(f"{path}.mlp")),
        )))  # fmt: skip
    tower = Tower(
        "vision", "vision", tuple(blocks), ("patch_embed", "blocks"), output=Tap(blocks[-1].path),
        samples=Tap("", "input", "grid_thw"),  # one row a picture; the stream is (L, D), one picture after another
    )  # fmt: skip
    return Anatomy((tower,), heads=("merger",))
