"""BLIP (Li et al., ICML 2022): a picture is read by a text tower that understands or writes. transformers' classes, and
our `tiny-blip`.

    pixel_values -> vision tower -> (B, 1 + P, D) --keys, values--> cross-attention in every block of the text tower
    input_ids    -> text tower, every token sees every token  -> first token: do they match? what is the answer?
    input_ids    -> text tower, a token sees those before it  -> the next word
"""

from __future__ import annotations

from trimtab.backbones.blip import (
    describe,  # noqa: F401  (registers how models are described)
    features,
    official,
)
from trimtab.backbones.family import Family

FAMILY = Family(
    "blip",
    "BLIP",
    __name__,
    folders={"blip": features.load},
    pretrained={"tiny-blip": features.tiny_blip},
    features=features.backbone,
    architecture=official.architecture,
    format=official.BlipFormat(),
    own=("BlipForMatchingAndCaptions", "BlipPretraining", "BlipForNlvr2", "BlipForVqa"),
)
