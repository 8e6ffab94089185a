"""Descriptions of transformers' own classes, one file a family, and tiny models of those that no family of ours has."""

from __future__ import annotations

from trimtab.backbones.described import (  # noqa: F401  (they register how models are described)
    bart,
    bert,
    bridgetower,
    decoder,
    florence2,
    grounding_dino,
    llava,
    swin,
    t5,
    vit,
)
from trimtab.backbones.family import Family

FAMILY = Family(
    "described",
    "transformers' own classes",
    __name__,
)
