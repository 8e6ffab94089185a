"""Tiny models of CLIP-ViL, with random weights, and what they are called with."""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import nn

from trimtab.backbones.clip_vil.model import ClipVilConfig, ClipVilModel
from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import BERT, BIG_PAIR


def build() -> nn.Module:
    sizes: dict[str, Any] = {"vision_width": 4, "vision_layers": (1, 2, 1, 1), "positions": 3, "pretraining_answers": 4}
    return ClipVilModel(ClipVilConfig(text_config=hf.BertConfig(**BERT), **sizes))


EXAMPLES: dict[str, Example] = {
    "clip-vil": Example("CLIP-ViL", build, BIG_PAIR),
}  # fmt: skip
