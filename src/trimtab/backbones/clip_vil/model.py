"""CLIP-ViL (Shen et al., ICLR 2022), pretrained: the grid of a CLIP ResNet and words in one BERT.

    picture --ResNet--> (B, C, h, w) --+ row + column--> linear, norm --> (B, h*w, D) --+
                                                                                       cat (B, L + h*w, D) --12 layers--
    text ---word + position + type embeddings-------------------------> (B, L, D) ------+

After `CLIP-ViL-Pretrain/src/lxrt/modeling.py`, built from transformers' BERT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, BertModel, PreTrainedConfig, PreTrainedModel
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform
from transformers.utils import ModelOutput

from trimtab.backbones.base import check_sizes
from trimtab.backbones.clip_vil.resnet import ClipResNet


class ClipVilConfig(PreTrainedConfig):
    """Sizes of a CLIP-ViL.

    Attributes:
        text_config: a `BertConfig` of the joint layers.
        vision_width: channels of the ResNet's stem.
        vision_layers: bottlenecks of its four stages.
        positions: rows of the tables of row and of column positions.
        pretraining_answers: outputs of the answer head of pretraining; 0 for a model without pretraining's heads.
        answers: outputs of the head for VQA; 0 for none.
    """

    model_type = "clip_vil"
    sub_configs_defaults: ClassVar[Any] = {"text_config": BertConfig}

    text_config: Any = None
    vision_width: int = 80
    vision_layers: Any = (4, 6, 10, 6)
    positions: int = 25
    pretraining_answers: int = 0
    answers: int = 0


@dataclass
class ClipVilOutput(ModelOutput):
    """Both parts of the joint sequence, (B, L, D) and (B, h*w, D), and its summary, (B, D)."""

    text: Tensor | None = None
    image: Tensor | None = None
    pooled: Tensor | None = None


class Pooler(nn.Module):
    """A linear map of the first token, without BERT's tanh."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, D)."""
        return self.dense(tokens[:, 0])


class PretrainingHeads(nn.Module):
    """Masked words, and whether picture and text belong together."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def words(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, V); the decoder is the table of word embeddings itself."""
        return nn.functional.linear(self.transform(tokens), embeddings, self.bias)


def answer_head(width: int, answers: int) -> nn.Sequential:
    """The norm comes after the activation; it has BERT's epsilon."""
    norm = nn.LayerNorm(2 * width, eps=1e-12)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), norm, nn.Linear(2 * width, answers))


class ClipVilModel(PreTrainedModel):
    """The joint model and the heads that its config asks for."""

    config_class = ClipVilConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: ClipVilConfig):
        super().__init__(config)
        text = config.text_config
        width, channels = text.hidden_size, 32 * config.vision_width
        self.vision = ClipResNet(config.vision_width, config.vision_layers)
        # The authors call the row axis x; the tables keep their names.
        self.x_position_embedding = nn.Embedding(config.positions, channels)
        self.y_position_embedding = nn.Embedding(config.positions, channels)
        self.visn_fc = nn.Linear(channels, width)
        self.visn_layer_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(text.hidden_dropout_prob)
        self.bert = BertModel(text, add_pooling_layer=False)  # its embeddings and its layers
        self.valid = nn.Identity()  # a name for the mask of the joint sequence, (B, L + h*w)
        self.pooler = Pooler(width)
        if config.pretraining_answers:
            self.cls = PretrainingHeads(text)
            self.answer_head = answer_head(width, config.pretraining_answers)
        if config.answers:
            self.logit_fc = answer_head(width, config.answers)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.bert.get_input_embeddings()

    def look(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> embedded places in row-major order, (B, h*w, D).

        Raises:
            ValueError: if H or W is no multiple of 32, or larger than the tables of positions reach.
        """
        size, limit = tuple(pixel_values.shape[2:]), 32 * self.config.positions
        if any(s % 32 or not 32 <= s <= limit for s in size):
            raise ValueError(
                f"picture of {size[0]} x {size[1]}: CLIP-ViL takes multiples of 32 pixels, {limit} at most"
            )
        grid = self.vision(pixel_values).permute(0, 2, 3, 1)  # (B, h, w, C)
        rows, columns = grid.shape[1:3]
        grid = grid + self.x_position_embedding.weight[:rows, None] + self.y_position_embedding.weight[None, :columns]
        return self.dropout(self.visn_layer_norm(self.visn_fc(grid.flatten(1, 2))))

    def forward(
        self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, image_mask: Tensor | None = None, seen: Tensor | None = None,
    ) -> ClipVilOutput:  # fmt: skip
        """Fuse pictures and texts.

        Args:
            pixel_values: (B, 3, H, W); padding is part of the picture unless `image_mask` says otherwise.
            input_ids, attention_mask, token_type_ids: (B, L); types are 0 if left out.
            image_mask: (B, h*w), 1 = valid; None takes all places.
            seen: what `look` gave, in place of `pixel_values`.

        Raises:
            ValueError: if the picture or the text is missing, the text is longer than BERT's table of positions, or the
                picture has a wrong size.
        """
        if seen is None and pixel_values is not None:
            seen = self.look(pixel_values)
        if seen is None or input_ids is None or attention_mask is None:
            raise ValueError(
                "CLIP-ViL reads a picture and a text: give pixel_values (or seen), input_ids, attention_mask"
            )
        check_sizes("CLIP-ViL", input_ids, self.config.text_config.max_position_embeddings)
        text = self.bert.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        image = seen
        if image_mask is None:
            image_mask = attention_mask.new_ones(image.shape[:2])
        valid = self.valid(torch.cat([attention_mask.to(image.dtype), image_mask.to(image.dtype)], dim=1))
        mask = (1 - valid[:, None, None]) * torch.finfo(image.dtype).min  # (B, 1, 1, L + h*w)
        joint = self.bert.encoder(torch.cat([text, image], dim=1), mask).last_hidden_state
        length = input_ids.shape[1]
        return ClipVilOutput(joint[:, :length], joint[:, length:], self.pooler(joint))


AutoConfig.register("clip_vil", ClipVilConfig)
