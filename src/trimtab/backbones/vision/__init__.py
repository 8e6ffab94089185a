"""Vision towers by themselves, for classification: ViT and DINO (Caron et al., ICCV 2021), DINOv2, Swin. transformers'
classes, which `backbones/described` describes."""

from __future__ import annotations

from trimtab.backbones.family import Family
from trimtab.backbones.vision import features

FAMILY = Family(
    "vision",
    "Vision towers",
    __name__,
    folders=dict.fromkeys(features.KINDS, features.load),
)
