"""ViLT (Kim et al., ICML 2021): one stream of text and image tokens. transformers' classes, and our `tiny-vilt`."""

from __future__ import annotations

from trimtab.backbones.family import Family
from trimtab.backbones.vilt import (
    describe,  # noqa: F401  (registers how models are described)
    features,
    official,
)

FAMILY = Family(
    "vilt",
    "ViLT",
    __name__,
    folders={"vilt": features.load},
    pretrained={"tiny-vilt": features.tiny_vilt},
    features=features.ViltBackbone,
    architecture=official.architecture,
    format=official.ViltFormat(),
    own=("ViltForPretraining",),
)
