"""Tiny models of X-VLM, with random weights, and what they are called with."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import BERT, BIG_PAIR, DECODER_MASK, DECODES, PAIR, PICTURE, VISION
from trimtab.backbones.xvlm.model import Xvlm, XvlmConfig


def build(vision: dict[str, Any], task: str = "pretrain") -> nn.Module:
    text: dict[str, Any] = {**BERT, "num_hidden_layers": 4}
    return Xvlm(XvlmConfig(text, vision, fusion_layer=2, embed=8, task=task, decoder_layers=2, local_layers=1))


SWIN: dict[str, Any] = {
    "model_type": "swin", "image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2],
    "window_size": 8, "hidden_size": 16, "mlp_ratio": 2,
}  # fmt: skip


VIT: dict[str, Any] = {"model_type": "clip_vision_model", **VISION, **PICTURE}


EXAMPLES: dict[str, Example] = {
    "xvlm-swin": Example("X-VLM, Swin", partial(build, SWIN), BIG_PAIR),
    "xvlm-clip": Example("X-VLM, CLIP ViT", partial(build, VIT), PAIR),
    "xvlm-vqa": Example(
        "X-VLM, questions", partial(build, VIT, "vqa"),
        {**PAIR, "answer_ids": DECODES, "answer_mask": DECODER_MASK}
    ),
}  # fmt: skip
