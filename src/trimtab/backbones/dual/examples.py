"""A tiny dual encoder, with random weights, and what it is called with."""

from __future__ import annotations

import transformers as hf
from torch import nn

from trimtab.backbones.dual.model import DualEncoder
from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import BERT, BIG_PAIR


def lite0_minilm() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet
    from efficientnet_lite_pytorch.utils import get_model_params

    stages, sizes = get_model_params("efficientnet-lite0", {"image_size": 64, "num_classes": 2})
    return DualEncoder(EfficientNet(stages[:3], sizes), hf.BertModel(hf.BertConfig(**BERT)), width=16)


EXAMPLES: dict[str, Example] = {
    "lite0-minilm": Example(
        "EfficientNet-Lite and MiniLM", lite0_minilm, BIG_PAIR, needs=("efficientnet_lite_pytorch",)
    ),
}  # fmt: skip
