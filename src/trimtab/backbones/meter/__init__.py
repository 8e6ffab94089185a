"""METER (Dou et al., CVPR 2022): CLIP's vision tower and RoBERTa, then two streams that read each other."""

from __future__ import annotations

from trimtab.backbones.family import Family
from trimtab.backbones.meter import (
    describe,  # noqa: F401  (registers how models are described)
    features,
    official,
)

FAMILY = Family(
    "meter",
    "METER",
    __name__,
    folders={"meter": features.load},
    features=features.MeterBackbone,
    architecture=official.architecture,
    format=official.MeterFormat(),
    own=("MeterModel",),
)
