"""CLIP (Radford et al., ICML 2021): two towers that meet in one space. transformers' classes, and our `tiny-clip`."""

from __future__ import annotations

from trimtab.backbones.clip import (
    describe,  # noqa: F401  (registers how models are described)
    features,
)
from trimtab.backbones.family import Family

FAMILY = Family(
    "clip",
    "CLIP",
    __name__,
    folders={"clip": features.load},
    pretrained={"tiny-clip": features.tiny_clip},
)
