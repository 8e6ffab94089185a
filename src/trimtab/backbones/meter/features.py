"""METER for tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.backbones.base import CLIP_MEAN, CLIP_STD, Backbone, Encoded, Pictures, find_tokenizer, load_pretrained
from trimtab.backbones.pictures import Cropped
from trimtab.backbones.processed import own_pictures


class MeterBackbone(Backbone):
    """A METER: texts and pictures to both streams, text first."""

    kind = "joint"

    def __init__(self, name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None):
        side = model.config.vision_config.image_size
        longest = model.config.text_config.max_position_embeddings - model.config.text_config.pad_token_id - 1
        width = 2 * model.config.cross_config.hidden_size
        super().__init__(name, model, tokenizer, pictures or Cropped(side, CLIP_MEAN, CLIP_STD, alpha=True), width,
                         min(longest, 50))  # fmt: skip
        self.side = side
        self.token_width = width // 2

    def look(self, pixel_values: Tensor) -> Tensor:
        """What of the pictures does not depend on the text, (B, 1+P, V)."""
        return self.model.look(pixel_values)

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """`pair` of what `look` returned."""
        return self._fused(seen, input_ids, attention_mask, 1)

    def pair_second(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """As `pair`; the picture has stream type 2, which a file loaded with the task `nlvr2` gives, else 1."""
        second = min(2, self.model.config.token_types - 1)
        return self._fused(self.look(pixel_values), input_ids, attention_mask, second)

    def own_head(self, task: str) -> nn.Module | None:
        """The published classifiers of NLVR2 and SNLI-VE."""
        return getattr(self.model, {"pairs": "nlvr2_classifier", "entailment": "snli_classifier"}.get(task, ""), None)

    def _fused(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor, image_type: int) -> Encoded:
        out = self.model(seen=seen, input_ids=input_ids, attention_mask=attention_mask, image_type=image_type)
        tokens = torch.cat([out.text, out.image], dim=1)  # (B, L + 1 + P, H)
        mask = torch.cat([attention_mask, attention_mask.new_ones(out.image.shape[:2])], dim=1)
        return Encoded(out.pooled, tokens, mask, slice(input_ids.shape[1] + 1, tokens.shape[1]))

    def match(self, encoded: Encoded) -> Tensor:
        """Logit that text and image belong together, (B,): of ranking if there is such a head, else of matching.

        Raises:
            ValueError: if the model has neither head.
        """
        tasks = self.model.config.tasks
        if "irtr" in tasks:
            return self.model.rank_output(encoded.pooled).squeeze(-1)
        if "itm" in tasks:
            logits = self.model.itm_score(encoded.pooled)
            return logits[:, 1] - logits[:, 0]
        raise ValueError(f"{self.name}: no head for matching: load it with tasks=('itm',) or ('irtr',)")


def load(folder: Path, name: str, pretrained: bool = True) -> MeterBackbone:
    """A folder that `trimtab convert` or `save_pretrained` wrote; with a tokenizer if there is one in it."""
    from trimtab.backbones.meter.model import MeterModel

    model = load_pretrained(MeterModel, folder, pretrained)
    return MeterBackbone(name, model, find_tokenizer(folder), own_pictures(folder))
