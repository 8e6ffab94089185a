"""BLIP (Li et al., ICML 2022) where transformers has no class or computes something else: pretraining, answers to
questions, and reasoning over two pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipTextModel,
    BlipVisionModel,
)
from transformers.models.blip.modeling_blip import BlipPreTrainedModel
from transformers.models.blip.modeling_blip_text import BlipTextAttention, BlipTextLMHeadModel, BlipTextSelfAttention

from trimtab.backbones.base import check_sizes


class BlipForMatchingAndCaptions(BlipForConditionalGeneration):
    """A BLIP with one text tower, which understands without the causal mask and writes with it, and a head for each.

    The published encoder and decoder share all but their self-attention; here they share that too.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)
        self.post_init()


class BlipPretraining(BlipPreTrainedModel):
    """All of BLIP: contrast, matching and captions, with its encoder and decoder of text sharing their weights.

    The decoder has its own self-attention and head; embeddings, cross-attention and feed-forward parts are those of the
    encoder (`tie_encoder_decoder_weights` in `blip_pretrain.py`). Parts are shared as modules, so that whatever is done
    to one (a mask, an adapter) is done to both.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.text_decoder = BlipTextLMHeadModel(config.text_config)
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, config.image_text_hidden_size)
        self.text_proj = nn.Linear(width, config.image_text_hidden_size)
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))
        shared = {"embeddings": self.text_encoder.embeddings}
        for i, layer in enumerate(self.text_encoder.encoder.layer):
            shared |= {f"encoder.layer.{i}.{part}": getattr(layer, part)
                       for part in ("crossattention", "intermediate", "output")}  # fmt: skip
        tied = {
            "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
            "text_decoder.cls.predictions.decoder.weight": "text_encoder.embeddings.word_embeddings.weight",
        }
        for path, module in shared.items():
            self.text_decoder.bert.set_submodule(path, module)
            tied |= {f"text_decoder.bert.{path}.{n}": f"text_encoder.{path}.{n}" for n, _ in module.named_parameters()}
        # For transformers, which else refuses to save what shares memory; the decoder's own list of ties would name
        # another source for the same weights.
        self._tied_weights_keys = tied
        self.text_decoder.all_tied_weights_keys = {}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.get_input_embeddings()

    def look(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1+P, D)."""
        return self.vision_model(pixel_values=pixel_values).last_hidden_state

    def contrast(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of pictures and of texts (which start with [CLS]), each (B, E)."""
        text = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(self.vision_proj(seen[:, 0]), dim=-1), F.normalize(self.text_proj(text[:, 0]), dim=-1)

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Texts (which start with [ENC], see `config.enc_token_id`) that have read pictures, (B, L, D)."""
        return self.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen
        ).last_hidden_state

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of "apart" and "together", (B, 2), with the first token replaced by [ENC].

        Raises:
            ValueError: if the text is too long, or the picture of another size than the model was built for.
        """
        _check(self.config, input_ids, pixel_values)
        ids = input_ids.clone()
        ids[:, 0] = self.config.enc_token_id
        return self.itm_head(self.fuse(self.look(pixel_values), ids, attention_mask)[:, 0])


class CrossAttention(BlipTextAttention):
    """transformers hands the mask of what is read to its attention under a name that cross-attention does not look at
    (5.23): padded questions would be read padding and all."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        read, weights = self.self(hidden_states, encoder_hidden_states=encoder_hidden_states,
                                  encoder_attention_mask=attention_mask, past_key_values=past_key_values)  # fmt: skip
        return self.output(read, hidden_states), weights


class BlipForVqa(BlipForQuestionAnswering):
    """transformers' class with a decoder that leaves out the padding of questions."""

    def __init__(self, config: Any):
        super().__init__(config)
        for i, layer in enumerate(self.text_decoder.bert.encoder.layer):
            layer.crossattention = CrossAttention(config.text_config, is_cross_attention=True, layer_idx=i)
        self.post_init()


class TwinCrossAttention(nn.Module):
    """Cross-attention to two pictures at once, each with its own weights; in the upper layers a linear map joins them,
    below it is their mean (`nlvr_encoder.py`)."""

    def __init__(self, config: Any, merge: bool):
        super().__init__()
        self.self0 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.self1 = BlipTextSelfAttention(config, is_cross_attention=True)
        self.output = TwinOutput(config, merge)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        parts = [
            attend(hidden_states, encoder_hidden_states=seen)[0]
            for attend, seen in zip((self.self0, self.self1), encoder_hidden_states, strict=True)
        ]
        return self.output(*parts, hidden_states), None


class TwinOutput(nn.Module):
    def __init__(self, config: Any, merge: bool):
        super().__init__()
        width = config.hidden_size
        self.dense0, self.dense1 = nn.Linear(width, width), nn.Linear(width, width)
        self.merge_layer = nn.Linear(2 * width, width) if merge else None
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, first: Tensor, second: Tensor, stream: Tensor) -> Tensor:
        first, second = self.dense0(first), self.dense1(second)
        both = (
            (first + second) / 2 if self.merge_layer is None else self.merge_layer(torch.cat([first, second], dim=-1))
        )
        return self.LayerNorm(self.dropout(both) + stream)


class BlipForNlvr2(BlipPreTrainedModel):
    """Is a sentence true of two pictures? A text encoder that reads both in every layer."""

    MERGE_FROM = 6  # the first layer of text with a map that joins the two

    def __init__(self, config: Any):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        for i, layer in enumerate(self.text_encoder.encoder.layer):
            layer.crossattention = TwinCrossAttention(config.text_config, i >= self.MERGE_FROM)
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_encoder.get_input_embeddings()

    def forward(self, first: Tensor, second: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) each, ids and mask (B, L) -> logits of "false" and "true", (B, 2).

        Raises:
            ValueError: if the text is too long, or a picture of another size than the model was built for.
        """
        return self.cls_head(self.fuse(first, second, input_ids, attention_mask)[:, 0])

    def fuse(self, first: Tensor, second: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Words that have read both pictures, (B, L, D); arguments and errors as `forward`."""
        for pixel_values in (first, second):
            _check(self.config, input_ids, pixel_values)
        seen = tuple(self.vision_model(pixel_values=x).last_hidden_state for x in (first, second))
        ids = input_ids.clone()
        ids[:, 0] = self.config.enc_token_id
        text = self.text_encoder(input_ids=ids, attention_mask=attention_mask, encoder_hidden_states=seen)
        return text.last_hidden_state


def _check(config: Any, input_ids: Tensor, pixel_values: Tensor) -> None:
    check_sizes("BLIP", input_ids, config.text_config.max_position_embeddings, pixel_values,
                config.vision_config.image_size)  # fmt: skip
