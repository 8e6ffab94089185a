"""Tiny models of CLIP, with random weights, and what they are called with."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers as hf
from torch import nn

from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import PAIR, PICTURE, SMALL, VISION


def clip_text(**options: Any) -> dict[str, Any]:
    return {**SMALL, "vocab_size": 30, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2, **options}


def two_towers(config: type, model: type, **vision: Any) -> nn.Module:
    """A model of transformers of two towers."""
    text = clip_text(**({"projection_size": 24} if model is not hf.CLIPModel else {}))
    return model(config(text_config=text, vision_config={**VISION, **PICTURE, **vision}))


EXAMPLES: dict[str, Example] = {
    "clip": Example("CLIP", partial(two_towers, hf.CLIPConfig, hf.CLIPModel), {**PAIR, "return_loss": True}),
}  # fmt: skip
