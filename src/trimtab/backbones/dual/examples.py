"""A tiny dual encoder and a tiny writer, with random weights, and what they are called with."""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import nn

from trimtab.backbones.dual.model import DualEncoder, PrefixWriter
from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import BERT, BIG_PAIR


def _vision() -> Any:
    from efficientnet_lite_pytorch import EfficientNet
    from efficientnet_lite_pytorch.utils import get_model_params

    stages, sizes = get_model_params("efficientnet-lite0", {"image_size": 64, "num_classes": 2})
    return EfficientNet(stages[:3], sizes)


def lite0_minilm() -> nn.Module:
    return DualEncoder(_vision(), hf.BertModel(hf.BertConfig(**BERT)), width=16)


def writer() -> nn.Module:
    text = {**BERT, "max_position_embeddings": 64}  # a grid of 8 x 8
    return PrefixWriter(_vision(), hf.BertModel(hf.BertConfig(**text, is_decoder=True)))


EXAMPLES: dict[str, Example] = {
    "lite0-minilm": Example(
        "EfficientNet-Lite and MiniLM", lite0_minilm, BIG_PAIR, needs=("efficientnet_lite_pytorch",)
    ),
    "lite0-minilm-writer": Example(
        "EfficientNet-Lite and MiniLM, writer", writer, BIG_PAIR, needs=("efficientnet_lite_pytorch",)
    ),
}  # fmt: skip
