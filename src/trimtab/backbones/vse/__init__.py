"""VSE-infinity (Chen et al., CVPR 2021): image and text meet as two vectors, pooled by a learned operator (GPO).

image -> ResNeXt-101 WSL, or the detector's ResNet-101 -> grid (B, C, H/32, W/32) -> tokens (B, HW, C) --+
or regions of bottom-up attention, (B, R, 2048) ---------------------------------------------------------+
                                                       fc (+ MLP for regions) -> GPO -> L2 norm -> (B, E)
text -> BERT -> tokens (B, L, 768) -> linear -> GPO -> L2 norm -> (B, E)            similarity: dot products
"""

from __future__ import annotations

from trimtab.backbones.family import Family
from trimtab.backbones.vse import (
    describe,  # noqa: F401  (registers how models are described)
    features,
    official,
)

FAMILY = Family(
    "vse",
    "VSE-infinity",
    __name__,
    folders={"trimtab_vse": features.load},
    features=features.VseBackbone,
    architecture=official.architecture,
    format=official.VseFormat(),
    own=("VseInfinity",),
)
