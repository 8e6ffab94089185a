"""The objective of BLIP's and X-VLM's pretraining, on pairs of a picture and a text: what pruners calibrate with.

    contrast   which picture belongs to which text of the batch? cross entropy of similarities, both ways
    matching   does this text belong to this picture? pairs, and for each a wrong text and a wrong picture, drawn from
               the batch in proportion to how similar they seem
    words      BLIP writes the text word by word (labels smoothed by 0.1); X-VLM finds masked words again

Left out: momentum copies with their queues (BLIP), and regions with their boxes (X-VLM), which plain pairs do not have.
The first two stand in `trimtab.contrast`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class PretrainingLoss(nn.Module):
    """A backbone behind its own pretraining objective: `forward(**batch)` gives `{"loss": scalar}`.

    Args:
        backbone: a pretrained BLIP or X-VLM, as `trimtab.load` gives it.
    """

    def __init__(self, backbone: Any):
        super().__init__()
        self.backbone = backbone

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.backbone.pretraining_loss(**batch)}
