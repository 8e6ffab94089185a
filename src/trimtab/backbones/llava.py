"""Vision towers whose tokens a language model reads among its own, both of whichever classes they are.

LLaVA (Liu et al., NeurIPS 2023), PaliGemma (Beyer et al., 2024), Idefics3 (Laurençon et al., 2024) and SmolVLM
(Marafioti et al., 2025), and Qwen2-, 2.5- and 3-VL. transformers' classes described.

The projector between them is never pruned. Image tokens count in the language tower: the mask of valid tokens has them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes, part_of
from trimtab.backbones.clip import tower_blocks


def _joined(model: Any, vision: str, text: str, *heads: str) -> Anatomy:
    seen, words = part_of(model, vision, "vision"), part_of(model, text, "text")
    (eye,) = seen.towers
    return Anatomy((replace(eye, feeds="text"), *words.towers), heads=(*heads, *seen.heads, *words.heads))


@describes("LlavaModel")
def describe_llava(model: Any) -> Anatomy:
    return _joined(model, "vision_tower", "language_model", "multi_modal_projector")


@describes("PaliGemmaModel")
def describe_paligemma(model: Any) -> Anatomy:
    found = describe_llava(model)
    vision, text = found.towers
    # The language model is handed a finished attention mask (B, 1, L, L): the tokens' own is seen before it.
    return replace(found, towers=(vision, replace(text, mask=Tap("", "input", "attention_mask"))))


@describes("Idefics3Model", "SmolVLMModel")
def describe_idefics3(model: Any) -> Anatomy:
    return _joined(model, "vision_model", "text_model", "connector")


@describes("Idefics3VisionTransformer", "SmolVLMVisionTransformer")
def describe_idefics3_vision(model: Any) -> Anatomy:
    tower = Tower(
        "vision", "vision", tower_blocks(model), ("embeddings", "encoder", "post_layernorm"),
        output=Tap("post_layernorm"),  # (pictures or frames, L, D)
        mask=Tap("", "input", "patch_attention_mask", flat=True), mask_required=False,
    )  # fmt: skip
    return Anatomy((tower,))


@describes("Qwen2VLModel", "Qwen2_5_VLModel")
def describe_qwen(model: Any) -> Anatomy:
    return _joined(model, "visual", "language_model")


@describes("Qwen3VLModel")
def describe_qwen3(model: Any) -> Anatomy:
    found = describe_qwen(model)
    vision, text = found.towers
    # DeepStack: what a vision block put out is summed into the stream after the first text blocks, by their numbers.
    count = len(model.visual.deepstack_visual_indexes)
    why = f"the model adds features of the picture after each of its first {count} text blocks, by number"
    blocks = tuple(replace(b, stays=why) if i < count else b for i, b in enumerate(text.blocks))
    closed = "features of the picture are added to the image tokens by position, between its first blocks"
    return replace(found, towers=(vision, replace(text, blocks=blocks, closed=closed)))


@describes(
    "Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen3VLVisionModel"
)  # fmt: skip
def describe_qwen_vision(model: Any) -> Anatomy:
    blocks = []
    for i, block in enumerate(model.blocks):
        path = f"blocks.{i}"
        blocks.append(Block(path, block.attn.proj.out_features, (
            Sublayer("attention", Tap(f"{path}.norm1", "input"), Tap(f"{path}.attn")),
            Sublayer("mlp", Tap(f"{path}.norm2", "input"), Tap(f"{path}.mlp")),
        )))  # fmt: skip
    tower = Tower(
        "vision", "vision", tuple(blocks), ("patch_embed", "pos_embed", "blocks"), output=Tap(blocks[-1].path),
        samples=Tap("", "input", "grid_thw"),  # one row a picture; the stream is (L, D), one picture after another
    )  # fmt: skip
    return Anatomy((tower,), heads=("merger", "deepstack_merger_list"))
