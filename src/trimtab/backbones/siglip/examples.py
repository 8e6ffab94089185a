"""Tiny models of SigLIP, with random weights, and what they are called with."""

from __future__ import annotations

from functools import partial

import transformers as hf

from trimtab.backbones.clip.examples import two_towers
from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import PAIR, PATCHES, TEXT

EXAMPLES: dict[str, Example] = {
    "siglip": Example("SigLIP", partial(two_towers, hf.SiglipConfig, hf.SiglipModel), {**PAIR, "return_loss": True}),
    "siglip2": Example(
        "SigLIP 2", partial(two_towers, hf.Siglip2Config, hf.Siglip2Model, num_patches=4),
        {**TEXT, **PATCHES, "return_loss": True},
    ),
}  # fmt: skip
