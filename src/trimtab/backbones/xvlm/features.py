"""X-VLM for tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.backbones.base import (
    CLIP_MEAN,
    CLIP_STD,
    Backbone,
    Encoded,
    Pictures,
    Unsupported,
    find_tokenizer,
    load_pretrained,
)
from trimtab.backbones.pairs import PairBackbone
from trimtab.backbones.processed import own_pictures
from trimtab.backbones.xvlm.pretraining import xvlm_loss


class XvlmBackbone(Backbone):
    """An X-VLM that fuses: text tokens that have seen the picture."""

    kind = "joint"

    def __init__(self, name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None):
        text = model.config.text_config
        side = model.config.vision_config.image_size
        pictures = pictures or Pictures(side, CLIP_MEAN, CLIP_STD)
        super().__init__(name, model, tokenizer, pictures, text.hidden_size, min(text.max_position_embeddings, 40))
        self.side = side

    def look(self, pixel_values: Tensor) -> Tensor:
        """Image tokens, (B, 1+P, V)."""
        return self.model.encode_image(pixel_values)

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """`pair` of what `look` returned; ValueError if the model only writes."""
        if not hasattr(self.model, "text_encoder"):
            raise ValueError(f"{self.name}: an X-VLM for captions has no encoder of text: load a pretrained file with "
                             "task='retrieval' or 'vqa'")  # fmt: skip
        text = self.model.encode_text(input_ids, attention_mask)
        tokens = self.model.fuse(text, attention_mask, seen)
        return Encoded(tokens[:, 0], tokens, attention_mask)

    def write(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Words of the decoder of captions; the decoder for VQA reads questions, and others have none."""
        if self.model.config.task != "caption":
            raise Unsupported(f"{self.name}: an X-VLM for {self.model.config.task} has no decoder that reads "
                                      "pictures: task='caption' has")  # fmt: skip
        return self.model.text_decoder.bert(input_ids, attention_mask=attention_mask, images=(seen,))

    @property
    def word_head(self) -> tuple[nn.Linear, nn.LayerNorm, Tensor] | None:
        if self.model.config.task != "caption":
            return None
        head = self.model.text_decoder.cls.predictions
        return head.transform.dense, head.transform.LayerNorm, head.bias

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

    def rank(self, encoded: Encoded, similar: Tensor) -> Tensor:
        """The logit of "together", as `Retrieval.py` takes it."""
        self.match(encoded)  # refuses a model without the head
        return self.model.itm_head(encoded.pooled)[:, 1]

    def image_vector(self, seen: Tensor) -> Tensor:
        if not hasattr(self.model, "vision_proj"):
            return super().image_vector(seen)
        return F.normalize(self.model.vision_proj(seen[:, 0]), dim=-1)

    def text_vector(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if not hasattr(self.model, "text_proj"):
            return super().text_vector(input_ids, attention_mask)
        return F.normalize(self.model.text_proj(self.model.encode_text(input_ids, attention_mask)[:, 0]), dim=-1)

    @property
    def temperature(self) -> Tensor:
        if not hasattr(self.model, "temp"):
            return super().temperature
        return self.model.temp.clamp(0.001, 0.5)  # as the authors keep it

    def answers(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self.texts(texts) if self.model.config.task == "vqa" else super().answers(texts)

    def answer_loss(self, question: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        if self.model.config.task != "vqa":
            return super().answer_loss(question, mask, answer_ids, answer_mask)
        from trimtab.backbones.xvlm.model import word_loss

        words = self.model.answer_words(question, mask, answer_ids, answer_mask)
        return word_loss(words.float(), answer_ids, padding=self.model.config.text_config.pad_token_id)

    def rank_answers(self, question: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor, k: int) -> Tensor:
        if self.model.config.task != "vqa":
            return super().rank_answers(question, mask, answer_ids, answer_mask, k)
        return self.model.rank_answers(question, mask, answer_ids, answer_mask, k)[0][:, 0]


class XvlmPairBackbone(PairBackbone):
    """The X-VLM of NLVR2, whose fusing layers take turns in reading two pictures."""

    words = 40

    def pair_of(self, first: Tensor, second: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """One vector (B, D): that of the fused class token."""
        seen = [self.model.encode_image(pixel_values) for pixel_values in (first, second)]
        tokens = self.model.fuse(self.model.encode_text(input_ids, attention_mask), attention_mask, *seen)
        return Encoded(tokens[:, 0], tokens, attention_mask)


def backbone(name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None) -> Backbone:
    """A model for tasks; its authors' preparation of pictures if none is given."""
    return (XvlmPairBackbone if model.config.task == "nlvr2" else XvlmBackbone)(name, model, tokenizer, pictures)


def load(folder: Path, name: str, pretrained: bool = True) -> Backbone:
    """A folder that `trimtab convert` or `save_pretrained` wrote; with a tokenizer if there is one in it."""
    from trimtab.backbones.xvlm.model import Xvlm

    model = load_pretrained(Xvlm, folder, pretrained)
    return backbone(name, model, find_tokenizer(folder), own_pictures(folder))
