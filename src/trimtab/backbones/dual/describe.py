"""The anatomy of the dual encoder, and of the writer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.anatomy import Anatomy, Block, Tap, Tower, describes
from trimtab.backbones.described import bert


@describes("DualEncoder")
def describe(model: Any) -> Anatomy:
    vision = replace(_vision(model), pooled=Tap("visual_projection"))
    (text,) = bert.describe(model.text).prefixed("text").towers
    text = replace(text, pooled=Tap("text_projection"))
    return Anatomy((vision, text), heads=("visual_projection", "text_projection"))


@describes("PrefixWriter")
def describe_writer(model: Any) -> Anatomy:
    """The text tower has the picture's tokens among its own: its mask of valid tokens has them too."""
    (text,) = bert.describe(model.text).prefixed("text").towers
    return Anatomy((_vision(model), replace(text, reads=("vision",), causal=True)), heads=("visual_map",))


def _vision(model: Any) -> Tower:
    blocks = []
    for i, layer in enumerate(model.vision._blocks):
        args = layer._block_args
        # The package holds strides as [2] in the first block of a stage and as 1 in its repeats.
        stride = args.stride if isinstance(args.stride, int) else max(args.stride)
        keeps = stride == 1 and args.input_filters == args.output_filters
        blocks.append(Block(f"vision._blocks.{i}", args.output_filters, keeps_shape=keeps, stream="inputs"))
    return Tower("vision", "vision", tuple(blocks), ("vision",), output=Tap("grid"), layout="grid")
