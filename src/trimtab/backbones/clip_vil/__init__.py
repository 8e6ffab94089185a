"""CLIP-ViL (Shen et al., ICLR 2022): the grid of a CLIP ResNet and a text in one BERT."""

from __future__ import annotations

from trimtab.backbones.clip_vil import (
    describe,  # noqa: F401  (registers how models are described)
    features,
    official,
)
from trimtab.backbones.family import Family

FAMILY = Family(
    "clip_vil",
    "CLIP-ViL",
    __name__,
    folders={"clip_vil": features.load},
    features=features.ClipVilBackbone,
    architecture=official.architecture,
    format=official.ClipVilFormat(),
    own=("ClipVilModel",),
)
