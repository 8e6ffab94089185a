"""The anatomy of CLIP-ViL."""

from __future__ import annotations

from typing import Any

from trimtab.anatomy import Anatomy, Block, Tap, Tower, describes
from trimtab.backbones.described import bert


@describes("ClipVilModel")
def describe(model: Any) -> Anatomy:
    blocks = []
    for stage in range(1, 5):
        for i, block in enumerate(getattr(model.vision, f"layer{stage}")):
            keeps = block.downsample is None
            blocks.append(Block(f"vision.layer{stage}.{i}", block.conv3.out_channels, keeps_shape=keeps, stream="x"))
    vision = Tower("vision", "vision", tuple(blocks), ("vision",), output=Tap("vision"), layout="grid")
    (text,) = bert.describe(model.bert).prefixed("bert").towers
    joint = Tower("fusion", "fusion", text.blocks, text.scope, output=text.output, mask=Tap("valid"),
                  pooled=Tap("pooler"), reads=("vision",))  # fmt: skip
    heads = ("pooler", "cls", "answer_head", "logit_fc")
    return Anatomy((vision, joint), heads=tuple(h for h in heads if hasattr(model, h)))
