"""Florence-2 (Xiao et al., CVPR 2024): DaViT gives a grid, BART reads it among its words. transformers' classes.

image (B, 3, H, W) -> stages of blocks, a convolution before each -> (B, C, H / 32, W / 32) -> projector -> 1 + P tokens
image tokens, then the words of the task -> BART's encoder -> BART's decoder, which writes words and places
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.anatomy import Anatomy, Block, Tap, Tower, describes, part_of


@describes("Florence2Model")
def describe(model: Any) -> Anatomy:
    vision = part_of(model, "vision_tower", "vision")
    (eye,) = vision.towers
    text = Anatomy.of(model.language_model).prefixed("language_model")
    heads = ("multi_modal_projector", *vision.heads, *text.heads)
    encoder, decoder = text.towers
    towers = (eye, replace(encoder, reads=("vision",)), decoder)
    return Anatomy(towers, heads=heads, ignored=vision.ignored)


@describes("Florence2VisionBackbone")
def describe_vision(model: Any) -> Anatomy:
    """DaViT (Ding et al., ECCV 2022): each block attends to windows of patches, then from channel to channel."""
    only = "it is the only block of its stage"
    blocks = tuple(
        # What flows between blocks is a grid (B, C, H, W): there is no stream of tokens for adapters to read.
        Block(f"blocks.{s}.{b}", model.embed_dim[s], stays=only if len(stage) == 1 else "")
        for s, stage in enumerate(model.blocks)
        for b in range(len(stage))
    )  # fmt: skip
    tower = Tower("vision", "vision", blocks, ("convs", "blocks"), output=Tap(blocks[-1].path), layout="grid")
    return Anatomy((tower,), ignored=("convs",))
