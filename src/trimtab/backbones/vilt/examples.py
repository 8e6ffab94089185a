"""Tiny models of ViLT, with random weights, and what they are called with."""

from __future__ import annotations

import torch
import transformers as hf

from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import PAIR, PICTURE, SMALL

EXAMPLES: dict[str, Example] = {
    "vilt": Example(
        "ViLT", lambda: hf.ViltForQuestionAnswering(hf.ViltConfig(**SMALL, **PICTURE, vocab_size=30, num_labels=3)),
        {**PAIR, "labels": torch.eye(3)[:2]},
    ),
}  # fmt: skip
