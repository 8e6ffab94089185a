"""Tiny models of METER, with random weights, and what they are called with."""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import nn

from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import BERT, PAIR, PICTURE, VISION
from trimtab.backbones.meter.model import MeterConfig, MeterModel


def build() -> nn.Module:
    text = hf.RobertaConfig(**BERT, type_vocab_size=1)
    cross = hf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    vision = hf.CLIPVisionConfig(**VISION, **PICTURE)
    heads: dict[str, Any] = {"vqa": 3, "itm": 2}
    return MeterModel(MeterConfig(vision_config=vision, text_config=text, cross_config=cross, tasks=heads))


EXAMPLES: dict[str, Example] = {
    "meter": Example("METER", build, PAIR),
}  # fmt: skip
