"""A language model that reads image tokens before its words, for tasks: LLaVA, PaliGemma, SmolVLM and Idefics3.

picture -> vision tower -> projector -> P image tokens --+
words -> embeddings (B, L, D) ---------------------------+-> [image, words] -> language model -> tokens (B, P + L, D)

A prompt of the family (a chat template, tokens around a picture) is not added: a task trains its head on what the
model makes of picture and words.
"""

from __future__ import annotations

from trimtab.backbones.family import Family
from trimtab.backbones.reader import features

FAMILY = Family(
    "reader",
    "LLaVA, PaliGemma, Idefics3, SmolVLM",
    __name__,
    folders=dict.fromkeys(("llava", "paligemma", "idefics3", "smolvlm"), features.load),
)
