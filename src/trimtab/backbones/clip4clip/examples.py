"""Tiny models of CLIP4Clip, with random weights, and what they are called with."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers as hf
from torch import nn

from trimtab.backbones.clip.examples import clip_text
from trimtab.backbones.clip4clip.model import Clip4Clip, Clip4ClipConfig
from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import FRAMES, PICTURE, SMALL, VISION


def build(head: str) -> nn.Module:
    config = hf.CLIPConfig(text_config=clip_text(), vision_config={**VISION, **PICTURE}, projection_dim=16)
    cross: dict[str, Any] = {**SMALL, "max_position_embeddings": 8}
    return Clip4Clip(Clip4ClipConfig(config.to_dict(), cross, head))


EXAMPLES: dict[str, Example] = {
    "clip4clip": Example("CLIP4Clip, meanP", partial(build, "meanP"), FRAMES),
    "clip4clip-seq": Example("CLIP4Clip, seqTransf", partial(build, "seqTransf"), FRAMES),
    "clip4clip-tight": Example("CLIP4Clip, tightTransf", partial(build, "tightTransf"), FRAMES),
}  # fmt: skip
