"""X-VLM for tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.backbones.base import CLIP_MEAN, CLIP_STD, Backbone, Encoded, Pictures, find_tokenizer, load_pretrained
from trimtab.backbones.processed import own_pictures
from trimtab.backbones.xvlm.pretraining import xvlm_loss


class XvlmBackbone(Backbone):
    """An X-VLM that fuses: text tokens that have seen the picture."""

    kind = "joint"

    def __init__(self, name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None):
        if model.config.task not in ("pretrain", "retrieval", "grounding"):
            raise ValueError(f"{name}: an X-VLM for {model.config.task} does its task by itself; for ours load a "
                             "pretrained file with task='retrieval'")  # fmt: skip
        text = model.config.text_config
        side = model.config.vision_config.image_size
        pictures = pictures or Pictures(side, CLIP_MEAN, CLIP_STD)
        super().__init__(name, model, tokenizer, pictures, text.hidden_size, min(text.max_position_embeddings, 40))
        self.side = side

    def pair(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        images, text = self.model.encode_image(pixel_values), self.model.encode_text(input_ids, attention_mask)
        tokens = self.model.fuse(text, attention_mask, images)
        return Encoded(tokens[:, 0], tokens, attention_mask)

    def own_head(self, task: str) -> nn.Module | None:
        """The published regression of boxes."""
        return getattr(self.model, "bbox_head", None) if task == "box-regression" else None

    def pretraining_loss(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Contrast, matching and masked words on a batch of pairs; NotImplementedError for what is fine-tuned."""
        if self.model.config.task != "pretrain":
            return super().pretraining_loss(pixel_values, input_ids, attention_mask)
        mask_id = 103 if self.tokenizer is None else self.tokenizer.mask_token_id  # 103: BERT's
        return xvlm_loss(self.model, pixel_values, input_ids, attention_mask, mask_id)

    def match(self, encoded: Encoded) -> Tensor:
        """Logit that text and image belong together, (B,); ValueError if the model has no head for it."""
        if not hasattr(self.model, "itm_head"):
            raise ValueError(f"{self.name}: no head for matching: load a pretrained file with task='retrieval'")
        no, yes = self.model.itm_head(encoded.pooled).unbind(dim=-1)
        return yes - no


class XvlmPairBackbone(Backbone):
    """The X-VLM of NLVR2, whose fusing layers take turns in reading two pictures."""

    kind = "pairs"

    def __init__(self, name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None):
        text, side = model.config.text_config, model.config.vision_config.image_size
        pictures = pictures or Pictures(side, CLIP_MEAN, CLIP_STD)
        super().__init__(name, model, tokenizer, pictures, text.hidden_size, min(text.max_position_embeddings, 40))
        self.side = side

    def pair_of(self, first: Tensor, second: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """One vector (B, D): that of the fused class token."""
        seen = [self.model.encode_image(pixel_values) for pixel_values in (first, second)]
        tokens = self.model.fuse(self.model.encode_text(input_ids, attention_mask), attention_mask, *seen)
        return Encoded(tokens[:, 0], tokens, attention_mask)

    @property
    def pair_width(self) -> int:
        return self.width

    def own_head(self, task: str) -> nn.Module | None:
        """The published classifier."""
        return self.model.cls_head if task == "pairs" else None


def backbone(name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None) -> Backbone:
    """A model for tasks; its authors' preparation of pictures if none is given.

    Raises:
        ValueError: for a model that does its task by itself.
    """
    return (XvlmPairBackbone if model.config.task == "nlvr2" else XvlmBackbone)(name, model, tokenizer, pictures)


def load(folder: Path, name: str, pretrained: bool = True) -> Backbone:
    """A folder that `trimtab convert` or `save_pretrained` wrote; with a tokenizer if there is one in it."""
    from trimtab.backbones.xvlm.model import Xvlm

    model = load_pretrained(Xvlm, folder, pretrained)
    return backbone(name, model, find_tokenizer(folder), own_pictures(folder))
