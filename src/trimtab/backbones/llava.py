"""Vision towers whose tokens a language model reads among its own: LLaVA (Liu et al., NeurIPS 2023) and Qwen-VL.

The projector between them is never pruned. Image tokens count in the language tower: the mask of valid tokens has them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes, part_of


@describes("LlavaModel")
def describe_llava(model: Any) -> Anatomy:
    vision, text = part_of(model, "vision_tower", "vision"), _words(model)
    (tower,) = vision.towers
    used = _blocks_used(model.config.vision_feature_layer, len(tower.blocks))
    # transformers finds the hidden state that the projector reads by counting blocks: none may go. Those after it run
    # for nothing: nothing is done to them.
    blocks = tuple(replace(b, keeps_shape=False) for b in tower.blocks[:used])
    tower = replace(tower, blocks=blocks, output=Tap(blocks[-1].path), pooled=None)
    ignored: tuple[str, ...] = ()
    if used < len(vision.towers[0].blocks):
        ignored = (blocks[-1].path.rpartition(".")[0],)
        before = [s for s in tower.scope if s.endswith(("embeddings", "pre_layrnorm"))]
        tower = replace(tower, scope=(*before, *(b.path for b in blocks)))
    heads = ("multi_modal_projector", *vision.heads, *text.heads)
    return Anatomy((tower, *text.towers), heads=heads, ignored=ignored)


def _words(model: Any) -> Anatomy:
    """The language model, among whose words the pictures stand."""
    found = part_of(model, "language_model", "text")
    return replace(found, towers=(replace(found.towers[0], reads=("vision",)),))


def _blocks_used(layers: int | list[int], count: int) -> int:
    """How many of a vision tower's blocks come before the last of its hidden states that the projector reads."""
    numbers = [layers] if isinstance(layers, int) else layers
    return max(n % (count + 1) for n in numbers)  # hidden state 0 is what enters the first block


@describes("Qwen2VLModel", "Qwen2_5_VLModel")
def describe_qwen(model: Any) -> Anatomy:
    vision, text = part_of(model, "visual", "vision"), _words(model)
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
