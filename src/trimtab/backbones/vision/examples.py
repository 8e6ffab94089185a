"""Tiny vision towers with their classifiers, with random weights, and what they are called with."""

from __future__ import annotations

import transformers as hf

from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import CLASSES, PICTURE, VISION, pixels

EXAMPLES: dict[str, Example] = {
    "dino": Example(
        "ViT, DINO",
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, **PICTURE)),
        {"pixel_values": pixels(2, 3, 16, 16), "labels": CLASSES},
    ),
    "dinov2": Example(
        "DINOv2",
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**VISION, **PICTURE, mlp_ratio=2)),
        {"pixel_values": pixels(2, 3, 16, 16), "labels": CLASSES},
    ),
}
