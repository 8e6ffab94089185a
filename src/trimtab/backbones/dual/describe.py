"""The anatomy of the dual encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.anatomy import Anatomy, Block, Tap, Tower, describes
from trimtab.backbones.described import bert


@describes("DualEncoder")
def describe(model: Any) -> Anatomy:
    blocks = []
    for i, layer in enumerate(model.vision._blocks):
        args = layer._block_args
        # The package holds strides as [2] in the first block of a stage and as 1 in its repeats.
        stride = args.stride if isinstance(args.stride, int) else max(args.stride)
        keeps = stride == 1 and args.input_filters == args.output_filters
        blocks.append(Block(f"vision._blocks.{i}", args.output_filters, keeps_shape=keeps, stream="inputs"))
    vision = Tower(
        "vision", "vision", tuple(blocks), ("vision",), output=Tap("grid"), layout="grid",
        pooled=Tap("visual_projection"),
    )  # fmt: skip
    (text,) = bert.describe(model.text).prefixed("text").towers
    text = replace(text, pooled=Tap("text_projection"))
    return Anatomy((vision, text), heads=("visual_projection", "text_projection"))
