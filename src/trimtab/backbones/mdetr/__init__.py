"""MDETR (Kamath et al., ICCV 2021): what a text names is found in a picture.

image (B, 3, H, W) -> ResNet, frozen batch norms -> 1x1 convolution -> tokens (B, H W / 32^2, D) --+
text (B, L) -> RoBERTa -> linear, norm -> (B, L, D) -----------------------------------------------+-> encoder
                                                                                                        |
queries (Q + answers, D) -----------------------> decoder, which reads the encoded image and text <-----+
                                                     |
class_embed (which words), bbox_embed (where), contrastive_align_projection_*; answer_*_head of the answers' queries
"""

from __future__ import annotations

from trimtab.backbones.family import Family
from trimtab.backbones.mdetr import (
    describe,  # noqa: F401  (registers how models are described)
    features,
    official,
)

FAMILY = Family(
    "mdetr",
    "MDETR",
    __name__,
    folders={"trimtab_mdetr": features.load},
    features=features.MdetrBackbone,
    architecture=official.architecture,
    format=official.MdetrFormat(),
    own=("Mdetr",),
)
