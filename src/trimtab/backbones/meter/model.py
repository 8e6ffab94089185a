"""METER (Dou et al., CVPR 2022): CLIP's vision tower and RoBERTa, then two streams that read each other.

    picture --CLIP ViT--> (B, 1+P, V) --linear, + type 1--> image stream --6 layers--> tanh(W first token) --+
                                                                ^ v                                      cat (B, 2H)
    text ----RoBERTa----> (B, L, T) ---linear, + type 0--> text stream ---6 layers--> tanh(W first token) ---+

    a layer of either stream attends to itself, then to the OTHER stream as it was before this layer, then feeds forward

After `meter/modules/meter_module.py`, built from transformers' CLIP, RoBERTa and BERT parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)
from transformers.models.bert.modeling_bert import BertLayer, BertPooler, BertPredictionHeadTransform
from transformers.utils import ModelOutput

from trimtab.backbones.base import check_sizes

TASKS = ("mlm", "itm", "vqa", "nlvr2", "snli", "irtr")


class MeterConfig(PreTrainedConfig):
    """Sizes of a METER.

    Attributes:
        vision_config: of the CLIP tower; its last block of the published CLIP is not built (11 of 12).
        text_config: of RoBERTa.
        cross_config: a `BertConfig` of the layers of both streams.
        tasks: task -> outputs of its head, among `TASKS`.
        token_types: rows of the table of stream types: 2, or 3 for pairs of images (NLVR2).
    """

    model_type = "meter"
    sub_configs_defaults: ClassVar[Any] = {
        "vision_config": CLIPVisionConfig,
        "text_config": RobertaConfig,
        "cross_config": BertConfig,
    }

    vision_config: Any = None
    text_config: Any = None
    cross_config: Any = None
    tasks: Any = None
    token_types: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tasks = dict(self.tasks or {})


@dataclass
class MeterOutput(ModelOutput):
    """Both streams after the last layer, (B, L, H) and (B, 1+P, H), and the pooled pair, (B, 2H)."""

    text: Tensor | None = None
    image: Tensor | None = None
    pooled: Tensor | None = None


class MeterVision(CLIPVisionModel):
    """CLIP's vision tower with its last norm on all tokens, not on the class token alone."""

    def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        """(B, 3, S, S) -> (B, 1+P, V)."""
        tokens = self.pre_layrnorm(self.embeddings(pixel_values))
        return self.post_layernorm(self.encoder(tokens).last_hidden_state)


class FusionLayer(BertLayer):
    """A post-norm BERT layer with cross-attention, called as `layer(stream, other stream, masks)`."""

    def __init__(self, config: BertConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        # BertLayer has cross-attention only as a decoder, whose self-attention looks back; here it looks everywhere.
        self.attention.self.is_causal = False

    def forward(self, hidden_states: Tensor, other: Tensor, mask: Tensor | None, other_mask: Tensor | None) -> Tensor:  # type: ignore[override]
        """(B, L, H) and (B, M, H), additive masks (B, 1, 1, L) and (B, 1, 1, M) -> (B, L, H)."""
        return super().forward(hidden_states, mask, other, other_mask)


class WordHead(nn.Module):
    """Scores of words; the decoder is not tied to the word embeddings."""

    def __init__(self, config: BertConfig, vocabulary: int):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, vocabulary, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.transform(tokens)) + self.bias


class MatchHead(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(width, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.fc(pooled)


def classifier(width: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outputs))


class MeterModel(PreTrainedModel):
    """The two towers, the fusion layers and the heads that `config.tasks` names, under their published names."""

    config_class = MeterConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: MeterConfig):
        super().__init__(config)
        fusion = config.cross_config
        fusion._attn_implementation = config._attn_implementation  # the fusion layers are no transformers model
        hidden, tasks = fusion.hidden_size, config.tasks
        self.vision = MeterVision(config.vision_config)
        self.text_transformer = RobertaModel(config.text_config, add_pooling_layer=False)
        self.cross_modal_text_transform = nn.Linear(config.text_config.hidden_size, hidden)
        self.cross_modal_image_transform = nn.Linear(config.vision_config.hidden_size, hidden)
        self.token_type_embeddings = nn.Embedding(config.token_types, hidden)
        self.cross_modal_text_layers: Any
        self.cross_modal_image_layers: Any
        self.cross_modal_text_pooler: Any
        self.cross_modal_image_pooler: Any
        for stream in ("text", "image"):
            layers = nn.ModuleList(FusionLayer(fusion) for _ in range(fusion.num_hidden_layers))
            setattr(self, f"cross_modal_{stream}_layers", layers)
            setattr(self, f"cross_modal_{stream}_pooler", BertPooler(fusion))
        if "mlm" in tasks:
            self.mlm_score = WordHead(fusion, tasks["mlm"])
        if "itm" in tasks:
            self.itm_score = MatchHead(2 * hidden)
        if "vqa" in tasks:
            self.vqa_classifier = classifier(2 * hidden, 2 * hidden, tasks["vqa"])
        if "nlvr2" in tasks:
            self.nlvr2_classifier = classifier(4 * hidden, 2 * hidden, tasks["nlvr2"])
        if "snli" in tasks:
            self.snli_classifier = classifier(2 * hidden, 2 * hidden, tasks["snli"])
        if "irtr" in tasks:
            self.rank_output = nn.Linear(2 * hidden, 1)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_transformer.get_input_embeddings()

    def look(self, pixel_values: Tensor) -> Tensor:
        """The vision tower alone, (B, 3, S, S) -> (B, 1+P, V); ValueError if S is not what the model was built for."""
        check_sizes("METER", pixel_values=pixel_values, side=self.config.vision_config.image_size)
        return self.vision(pixel_values)

    def forward(
        self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        seen: Tensor | None = None, image_type: int = 1,
    ) -> MeterOutput:  # fmt: skip
        """Fuse pictures and texts.

        Args:
            pixel_values: (B, 3, S, S).
            input_ids: (B, L), RoBERTa's ids, padded with 1.
            attention_mask: (B, L), 1 = valid.
            seen: what `look` gave, in place of `pixel_values`.
            image_type: row of the table of stream types: 1, or 2 for the second image of a pair.

        Raises:
            ValueError: if the picture or the text is missing, the text is longer than RoBERTa's table of positions, or
                the picture of another size than the model was built for (see the setting `image_size` of its loader).
        """
        if seen is None and pixel_values is not None:
            seen = self.look(pixel_values)
        if seen is None or input_ids is None or attention_mask is None:
            raise ValueError("METER reads a picture and a text: give pixel_values (or seen), input_ids, attention_mask")
        # RoBERTa's positions start after the padding id.
        longest = self.config.text_config.max_position_embeddings - self.config.text_config.pad_token_id - 1
        check_sizes("METER", input_ids, longest)
        image = self.cross_modal_image_transform(seen)  # (B, 1+P, H)
        mask = (1 - attention_mask[:, None, None].to(image.dtype)) * torch.finfo(image.dtype).min  # (B, 1, 1, L)
        words = self.text_transformer(input_ids=input_ids, attention_mask=mask).last_hidden_state
        text = self.cross_modal_text_transform(words) + self.token_type_embeddings.weight[0]  # (B, L, H)
        image = image + self.token_type_embeddings.weight[image_type]
        for for_text, for_image in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            text, image = (
                for_text(text, image, mask, None),
                for_image(image, text, None, mask),
            )  # both read the old ones
        pooled = torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], dim=-1)
        return MeterOutput(text, image, pooled)

    def nlvr2(self, first: Tensor, second: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, 2) that a text is false or true of two pictures, each (B, 3, S, S)."""
        pairs = [
            self(pixel_values=x, input_ids=input_ids, attention_mask=attention_mask, image_type=i).pooled
            for i, x in ((1, first), (2, second))
        ]
        return self.nlvr2_classifier(torch.cat(pairs, dim=-1))


AutoConfig.register("meter", MeterConfig)
