"""X-VLM (Zeng et al., ICML 2022): a BERT whose upper layers read the picture.

    image (B, 3, S, S) --Swin or CLIP ViT--> (B, 1 + P, V) --------------+----> vision_proj of token 0 --+
                                                                         | keys, values                  +-> similarity
    text (B, L) --BERT layers 0 to 5--> (B, L, D) --BERT layers 6 to 11--+----> fused (B, L, D)          |
                                             +------------------------------> text_proj of token 0 ------+
    fused token 0 -> itm_head (match), bbox_head (where), cls_head (NLVR2); fused tokens -> masked words

Answers (VQA) come from a causal BERT that attends to the fused question, captions from a causal one that attends to the
image.
"""

from __future__ import annotations

from trimtab.backbones.family import Family
from trimtab.backbones.xvlm import (
    describe,  # noqa: F401  (registers how models are described)
    features,
    official,
)

FAMILY = Family(
    "xvlm",
    "X-VLM",
    __name__,
    folders={"trimtab_xvlm": features.load},
    features=features.backbone,
    architecture=official.architecture,
    format=official.XvlmFormat(),
    own=("Xvlm",),
)
