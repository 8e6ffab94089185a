"""ViLT with the two heads of its pretraining, which transformers has only one by one."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import ViltConfig, ViltModel
from transformers.models.vilt.modeling_vilt import ViltMLMHead, ViltPreTrainedModel


class ViltForPretraining(ViltPreTrainedModel):
    """Masked words and image-text matching.

    The authors' decoder of words is not tied to the word embeddings. transformers ties the two in `ViltForMaskedLM`
    whatever its config says, and would overwrite the embeddings; here they stay apart.
    """

    def __init__(self, config: ViltConfig):
        super().__init__(config)
        self.vilt = ViltModel(config)
        self.mlm_score = ViltMLMHead(config)
        self.itm_score = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of words, (B, L, V), and of "apart" and "together", (B, 2); arguments as `ViltModel`."""
        out = self.vilt(input_ids=input_ids, **inputs)
        return self.mlm_score(out.last_hidden_state[:, : input_ids.shape[1]]), self.itm_score(out.pooler_output)
