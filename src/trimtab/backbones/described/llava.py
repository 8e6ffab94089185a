"""Vision towers whose tokens a language model reads among its own, both of whichever classes they are.

LLaVA (Liu et al., NeurIPS 2023), PaliGemma (Beyer et al., 2024), Idefics3 (Laurençon et al., 2024) and SmolVLM
(Marafioti et al., 2025), and Qwen2-, 2.5- and 3-VL. transformers' classes described.

The projector between them is never pruned. Image tokens count in the language tower: the mask of valid tokens has them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes, part_of
from trimtab.backbones.clip.describe import tower_blocks


def _joined(model: Any, vision: str, text: str, *heads: str) -> Anatomy:
    """The tower that sees, and the language model among whose words what it sees stands."""
    seen, words = part_of(model, vision, "vision"), part_of(model, text, "text")
    (language,) = words.towers
    towers = (*seen.towers, replace(language, reads=("vision",)))
    return Anatomy(towers, heads=(*heads, *seen.heads, *words.heads))


@describes("LlavaModel")
def describe_llava(model: Any) -> Anatomy:
    found = _joined(model, "vision_tower", "language_model", "multi_modal_projector")
    tower, words = found.towers
    count = len(tower.blocks)
    used = _blocks_used(model.config.vision_feature_layer, count)
    # transformers finds the hidden state that the projector reads by counting blocks: none may go. Those after it run
    # for nothing: nothing is done to them.
    blocks = tuple(replace(b, keeps_shape=False) for b in tower.blocks[:used])
    tower = replace(tower, blocks=blocks, output=Tap(blocks[-1].path), pooled=None)
    ignored = found.ignored
    if used < count:
        ignored = (*ignored, blocks[-1].path.rpartition(".")[0])
        before = [s for s in tower.scope if s.endswith(("embeddings", "pre_layrnorm"))]
        tower = replace(tower, scope=(*before, *(b.path for b in blocks)))
    return replace(found, towers=(tower, words), ignored=ignored)


def _blocks_used(layers: int | list[int], count: int) -> int:
    """How many of a vision tower's blocks come before the last of its hidden states that the projector reads."""
    numbers = [layers] if isinstance(layers, int) else layers
    return max(n % (count + 1) for n in numbers)  # hidden state 0 is what enters the first block


@describes("PaliGemmaModel")
def describe_paligemma(model: Any) -> Anatomy:
    found = _joined(model, "vision_tower", "language_model", "multi_modal_projector")
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
