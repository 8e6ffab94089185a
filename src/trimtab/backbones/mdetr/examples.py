"""Tiny models of MDETR, with random weights, and what they are called with."""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import nn

from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import BERT, BIG_PAIR, CNN
from trimtab.backbones.mdetr.model import Mdetr, MdetrConfig


def build() -> nn.Module:
    text = hf.RobertaConfig(**BERT, type_vocab_size=1)
    sizes: dict[str, Any] = {"width": 16, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "feed_forward": 32}
    return Mdetr(MdetrConfig(text, {**CNN, "frozen": True}, **sizes, queries=3, classes=6, align=8))


EXAMPLES: dict[str, Example] = {
    "mdetr": Example("MDETR", build, BIG_PAIR),
}  # fmt: skip
