"""CLIP4Clip (Luo et al., Neurocomputing 2022): CLIP on the frames of a video, and four ways to compare it with a text.

video (B, F, 3, H, W) -> CLIP's vision tower, frame by frame -> (B, F, E) --+
text (B, L) -> CLIP's text tower -> (B, E) ---------------------------------+-> head -> similarities (texts, videos)

meanP        mean over frames
seqLSTM      an LSTM over frames, with a shortcut, then the mean
seqTransf    a transformer over frames, with a shortcut, then the mean
tightTransf  a transformer over [text; frames] of every pair, one logit a pair
"""

from __future__ import annotations

from trimtab.backbones.clip4clip import (
    describe,  # noqa: F401  (registers how models are described)
    features,
    official,
)
from trimtab.backbones.family import Family

FAMILY = Family(
    "clip4clip",
    "CLIP4Clip",
    __name__,
    folders={"trimtab_clip4clip": features.load},
    features=features.Clip4ClipBackbone,
    architecture=official.architecture,
    format=official.Clip4ClipFormat(),
    own=("Clip4Clip",),
)
