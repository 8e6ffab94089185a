"""Tiny models of BLIP, with random weights, and what they are called with."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers as hf
from torch import nn

from trimtab.backbones.blip.model import BlipForMatchingAndCaptions, BlipForNlvr2, BlipForVqa, BlipPretraining
from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import BERT, PAIR, PICTURE, QUESTION, TEXT, VISION, pixels


def build(model: type) -> nn.Module:
    text: dict[str, Any] = {
        **BERT, "encoder_hidden_size": 16, "bos_token_id": 28, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision: dict[str, Any] = {
        **VISION,
        **PICTURE,
        "hidden_size": 16,
    }  # questions are read as pictures are: one width for both
    config = hf.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8)
    config.enc_token_id = 29
    return model(config)


EXAMPLES: dict[str, Example] = {
    "blip": Example("BLIP, questions", partial(build, BlipForVqa), QUESTION),
    "blip-pretrain": Example("BLIP, pretraining", partial(build, BlipPretraining), PAIR, idle=("decoder",)),
    "blip-nlvr2": Example(
        "BLIP, two pictures", partial(build, BlipForNlvr2),
        {**TEXT, "first": pixels(2, 3, 16, 16), "second": pixels(2, 3, 16, 16).flip(0)},
    ),
    "tiny-blip": Example("BLIP, one text tower", partial(build, BlipForMatchingAndCaptions), PAIR),
}  # fmt: skip
