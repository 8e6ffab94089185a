"""SigLIP (Zhai et al., ICCV 2023) and SigLIP 2: two towers that meet in one space. transformers' classes."""

from __future__ import annotations

from trimtab.backbones.family import Family
from trimtab.backbones.siglip import (
    describe,  # noqa: F401  (registers how models are described)
    features,
)

FAMILY = Family(
    "siglip",
    "SigLIP",
    __name__,
    folders={"siglip": features.load, "siglip2": features.load},
)
