"""The modules of X-VLM; what they compute is drawn in `trimtab.backbones.xvlm.features`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, BertConfig, CLIPVisionConfig, PretrainedConfig, PreTrainedModel, SwinConfig
from transformers.models.bert.modeling_bert import (
    BertCrossAttention,
    BertEmbeddings,
    BertLayer,
    BertPredictionHeadTransform,
    BertPreTrainedModel,
)

from trimtab.backbones.base import check_sizes
from trimtab.backbones.xvlm.vision import ClipTower, SwinTower
from trimtab.registry import unknown

# Task -> its parts beside the vision tower and the text encoder.
TASKS: dict[str, tuple[str, ...]] = {
    "pretrain": ("contrast", "itm_head", "mlm", "bbox_head"),
    "retrieval": ("contrast", "itm_head"),
    "grounding": ("bbox_head",),
    "nlvr2": ("cls_head",),
    "vqa": ("text_decoder",),
    "caption": ("text_decoder",),
}


class XvlmConfig(PretrainedConfig):
    """Sizes of an X-VLM.

    Args:
        text_config: of the BERT that encodes text in its first layers and fuses in the others.
        vision_config: a `SwinConfig` or a `CLIPVisionConfig`.
        fusion_layer: the first of BERT's layers that sees the image.
        embed: width of the common space.
        task: one of `TASKS`.
        decoder_layers: of the answer decoder (VQA).
        local_layers: last blocks of CLIP's tower that see regions apart.
    """

    model_type = "trimtab_xvlm"
    sub_configs = {"text_config": BertConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        fusion_layer: int = 6,
        embed: int = 256,
        task: str = "pretrain",
        decoder_layers: int = 6,
        local_layers: int = 4,
        **rest: Any,
    ):
        self.text_config = text_config if isinstance(text_config, BertConfig) else BertConfig(**(text_config or {}))
        if not isinstance(vision_config, PretrainedConfig):
            fields = dict(vision_config or {"model_type": "swin"})
            kind = SwinConfig if fields.pop("model_type") == "swin" else CLIPVisionConfig
            vision_config = kind(**fields)
        self.vision_config = vision_config
        if task not in TASKS:
            raise ValueError(unknown("task of an X-VLM", task, TASKS))
        self.fusion_layer, self.embed, self.task = fusion_layer, embed, task
        self.decoder_layers, self.local_layers = decoder_layers, local_layers
        super().__init__(**rest)

    @property
    def vision_width(self) -> int:
        """Channels of the image tokens."""
        return self.vision_config.hidden_size


class SharedCross(BertCrossAttention):
    """Attention to a further image, whose maps of keys and values are those of another layer, whatever stands there."""

    first: Any

    def __init__(self, config: Any, first: Any):
        super().__init__(config)
        del self.key, self.value
        self.__dict__["first"] = first  # no part of this layer: saved, counted and pruned where it is

    @property
    def key(self) -> nn.Module:
        return self.first.key

    @property
    def value(self) -> nn.Module:
        return self.first.value


class FusionBert(BertPreTrainedModel):
    """BERT whose layers from `fusion` on attend to image tokens between self-attention and feed-forward part.

    Args:
        config: its sizes.
        fusion: the first layer that sees images; as many as there are layers if none does.
        width: channels of the image tokens.
        images: how many images there are; layers take turns, and each turn shares its key and value maps (NLVR2).
        causal: whether a token sees only those before it.
    """

    def __init__(self, config: Any, fusion: int, width: int, images: int = 1, causal: bool = False):
        super().__init__(config)
        self.fusion, self.images, self.causal = fusion, images, causal
        self.embeddings = BertEmbeddings(config)
        self.encoder: Any = nn.Module()
        self.encoder.layer = nn.ModuleList()
        seeing = copy.copy(config)  # transformers gives cross-attention only to what it calls a decoder
        seeing.is_decoder = seeing.add_cross_attention = True
        for i in range(config.num_hidden_layers):
            layer: Any = BertLayer(config if i < fusion else seeing)
            layer.attention.self.is_causal = causal
            layer.attention.self.config = config  # which says what computes attention, and may change
            if i >= fusion:
                layer.crossattention.self.config = config
                cross, turn = layer.crossattention.self, (i - fusion) % images
                if width != config.hidden_size:
                    cross.key = nn.Linear(width, config.hidden_size)
                    cross.value = nn.Linear(width, config.hidden_size)
                if turn:
                    first: Any = self.encoder.layer[i - turn]
                    layer.crossattention.self = SharedCross(config, first.crossattention.self)
            self.encoder.layer.append(layer)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        images: tuple[Tensor, ...] = (),
        image_masks: tuple[Tensor | None, ...] = (),
        text: Tensor | None = None,
    ) -> Tensor:
        """Text alone, or text and images, or (from `text`, what text alone gave) their fusion alone.

        Args:
            input_ids: (B, L), unless `text` is given.
            attention_mask: (B, L), 1 = valid.
            images: image tokens (B, T, width), one of each image; none for text alone.
            image_masks: (B, T) each, 1 = visible, or None.
            text: (B, L, D), goes in at the first fusion layer.

        Returns:
            (B, L, D).
        """
        if text is None:
            check_sizes("X-VLM", input_ids, self.config.max_position_embeddings)
            x, start = self.embeddings(input_ids), 0
        else:
            x, start = text, self.fusion
        hidden = self._hidden(x, attention_mask)
        masks = [None if m is None else additive(m, x) for m in image_masks] or [None] * len(images)
        stop = len(self.encoder.layer) if images else self.fusion
        for i in range(start, stop):
            if i < self.fusion:
                x = self.encoder.layer[i](x, hidden)
            else:
                turn = (i - self.fusion) % len(images)
                x = self.encoder.layer[i](x, hidden, images[turn], masks[turn])
        return x

    def _hidden(self, x: Tensor, mask: Tensor | None) -> Tensor:
        mask = torch.ones(x.shape[:2], device=x.device) if mask is None else mask
        hidden = additive(mask, x)
        if self.causal:
            size = x.shape[1]
            later = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
            hidden = hidden.masked_fill(later, -10000.0)  # (B, 1, L, L)
        return hidden


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to attention scores, (B, L) -> (B, 1, 1, L)."""
    return ((1.0 - mask.to(like.dtype)) * -10000.0)[:, None, None, :]


class WordHead(nn.Module):
    """Scores of all words, (.., D) -> (.., V); the matrix is that of the word embeddings, which are handed in."""

    def __init__(self, config: Any):
        super().__init__()
        self.predictions: Any = nn.Module()
        self.predictions.transform = BertPredictionHeadTransform(config)
        self.predictions.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        return F.linear(self.predictions.transform(x), words, self.predictions.bias)


class TextModel(nn.Module):
    """A `FusionBert` with or without a head that predicts words."""

    def __init__(self, config: Any, words: bool, **options: Any):
        super().__init__()
        self.bert = FusionBert(config, **options)
        self.cls = WordHead(config) if words else None

    def scores(self, x: Tensor) -> Tensor:
        """Scores of words, (.., D) -> (.., V)."""
        assert self.cls is not None
        return self.cls(x, self.bert.embeddings.word_embeddings.weight)


def head(width: int, outputs: int) -> nn.Sequential:
    """Every task's head."""
    return nn.Sequential(nn.Linear(width, width * 2), nn.LayerNorm(width * 2), nn.GELU(), nn.Linear(width * 2, outputs))


class Xvlm(PreTrainedModel):
    """X-VLM for pretraining or one of its tasks; parts that a task lacks are not there."""

    config_class = XvlmConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: XvlmConfig):
        super().__init__(config)
        parts, width, vision = TASKS[config.task], config.text_config.hidden_size, config.vision_width
        swin = config.vision_config.model_type == "swin"
        config.vision_config.local_layers = config.local_layers
        self.vision_encoder = SwinTower(config.vision_config) if swin else ClipTower(config.vision_config)
        if config.task != "caption":  # captions come from a decoder that is the text encoder made causal
            images = 2 if config.task == "nlvr2" else 1
            self.text_encoder = TextModel(config.text_config, "mlm" in parts, fusion=config.fusion_layer, width=vision,
                                          images=images)  # fmt: skip
        if config.task == "caption":
            options = {"fusion": config.fusion_layer, "width": vision}
            self.text_decoder = TextModel(config.text_config, True, causal=True, **options)
        if config.task == "vqa":
            shorter = copy.copy(config.text_config)
            shorter.num_hidden_layers = config.decoder_layers
            self.text_decoder = TextModel(shorter, True, fusion=0, width=width, causal=True)
        if "contrast" in parts:
            self.vision_proj, self.text_proj = nn.Linear(vision, config.embed), nn.Linear(width, config.embed)
            self.temp = nn.Parameter(torch.tensor(0.07))
        if "itm_head" in parts:
            self.itm_head = head(width, 2)  # output 1: they belong together
        if "bbox_head" in parts:
            self.bbox_head = head(width, 4)
        if "cls_head" in parts:
            self.cls_head = head(width, 2)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Of the encoder of text; of the decoder where there is none (captions)."""
        text = self.text_decoder if self.config.task == "caption" else self.text_encoder
        return text.bert.embeddings.word_embeddings

    # --- parts ---------------------------------------------------------------------------------------------------

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + P, V)."""
        return self.vision_encoder(pixel_values)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) -> (B, L, D), without the image."""
        return self.text_encoder.bert(input_ids, attention_mask=attention_mask)

    def fuse(self, text: Tensor, attention_mask: Tensor, *images: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Encoded text (B, L, D) and image tokens (B, T, V), of two images for NLVR2 -> (B, L, D)."""
        return self.text_encoder.bert(
            attention_mask=attention_mask, text=text, images=images, image_masks=(image_mask,) * len(images)
        )

    def features(self, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of length 1 in the common space, (B, E) each, from image tokens and encoded text."""
        return (F.normalize(self.vision_proj(images[:, 0]), dim=-1), F.normalize(self.text_proj(text[:, 0]), dim=-1))

    def boxes(self, fused: Tensor) -> Tensor:
        """Where the text is in the image, (B, L, D) -> (B, 4): centre, width and height as parts of the image."""
        return self.bbox_head(fused[:, 0]).sigmoid()

    # --- tasks ---------------------------------------------------------------------------------------------------

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor,
                second_image: Tensor | None = None, answer_ids: Tensor | None = None,
                answer_mask: Tensor | None = None) -> dict[str, Tensor]:  # fmt: skip
        """What the task's heads say about images and texts.

        Args:
            pixel_values: (B, 3, S, S).
            input_ids, attention_mask: (B, L); the caption, question or phrase.
            second_image: (B, 3, S, S), for `nlvr2`.
            answer_ids, answer_mask: (B, A), for `vqa`.

        Returns:
            By name: `image_features`, `text_features` (B, E), `similar` (B, B, images by texts), `match` (B, 2),
            `words` (B, L or A, V), `boxes` (B, 4), `classes` (B, 2), whichever the task has.
        """
        images = self.encode_image(pixel_values)
        if self.config.task == "caption":
            hidden = self.text_decoder.bert(input_ids, attention_mask=attention_mask, images=(images,))
            return {"words": self.text_decoder.scores(hidden)}
        text = self.encode_text(input_ids, attention_mask)
        if self.config.task == "nlvr2":
            if second_image is None:
                raise ValueError("an X-VLM for nlvr2 compares two images: give second_image")
            fused = self.fuse(text, attention_mask, images, self.encode_image(second_image))
            return {"classes": self.cls_head(fused[:, 0])}
        fused = self.fuse(text, attention_mask, images)
        if self.config.task == "vqa":
            if answer_ids is None:
                raise ValueError("an X-VLM for vqa scores answers: give answer_ids and answer_mask")
            return {"words": self.answer_words(fused, attention_mask, answer_ids, answer_mask)}
        return self._heads(images, text, fused)

    def _heads(self, images: Tensor, text: Tensor, fused: Tensor) -> dict[str, Tensor]:
        parts = TASKS[self.config.task]
        out: dict[str, Tensor] = {}
        if "contrast" in parts:
            image, words = self.features(images, text)
            out |= {"image_features": image, "text_features": words, "similar": image @ words.T / self.temp}
        if "itm_head" in parts:
            out["match"] = self.itm_head(fused[:, 0])
        if "mlm" in parts:
            out["words"] = self.text_encoder.scores(fused)
        if "bbox_head" in parts:
            out["boxes"] = self.boxes(fused)
        return out

    def answer_words(self, question: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor | None) -> Tensor:
        """Scores of the next word after each of an answer's, (N, A, V), given fused questions (N, L, D)."""
        decoder = self.text_decoder
        hidden = decoder.bert(answer_ids, attention_mask=answer_mask, images=(question,), image_masks=(mask,))
        return decoder.scores(hidden)

    def rank_answers(self, question: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor,
                     k: int) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The best of a list of answers, as published.

        The k answers whose first words are likeliest are scored whole. Their first word counts twice, in its own
        probability and in the loss of the whole answer, as in the authors' code.

        Args:
            question, mask: fused questions (B, L, D) and their masks (B, L).
            answer_ids, answer_mask: the list, (N, A); the first token of each starts an answer.
            k: how many are scored.

        Returns:
            Numbers of answers and their probabilities, best first, (B, k) each.
        """
        start = answer_ids[:1, :1].expand(len(question), -1)
        first = self.answer_words(question, mask, start, None)[:, 0].softmax(dim=-1)  # (B, V)
        likely, chosen = first[:, answer_ids[:, 1]].topk(k, dim=1)  # (B, k)
        ids, seen = answer_ids[chosen].flatten(0, 1), answer_mask[chosen].flatten(0, 1)  # (B k, A)
        words = self.answer_words(question.repeat_interleave(k, 0), mask.repeat_interleave(k, 0), ids, seen)
        loss = word_loss(words, ids).view(-1, k)
        best, order = (likely.log() - loss).softmax(dim=-1).sort(dim=1, descending=True)
        return chosen.gather(1, order), best

    @torch.no_grad()
    def caption(self, pixel_values: Tensor, prompt_ids: Tensor, end: int, length: int = 30) -> Tensor:
        """Captions by the likeliest next word, (B, prompt + new); after `end` a caption repeats it.

        Args:
            pixel_values: (B, 3, S, S).
            prompt_ids: (B, Q): class token and prompt ("a picture of").
            end: id of the token that ends a caption.
            length: tokens at most, prompt included.
        """
        images, ids = self.encode_image(pixel_values), prompt_ids
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        while ids.shape[1] < length and not bool(done.all()):
            hidden = self.text_decoder.bert(ids, images=(images,))
            best = self.text_decoder.scores(hidden[:, -1]).argmax(dim=-1).masked_fill(done, end)
            ids, done = torch.cat([ids, best[:, None]], dim=1), done | (best == end)
        return ids


def word_loss(words: Tensor, ids: Tensor, skip: int = 0, padding: int = 0, smoothing: float = 0.0) -> Tensor:
    """Loss of predicting each token from those before it, summed over a text, (N,).

    Args:
        words: (N, A, V).
        ids: (N, A); padding counts nothing.
        skip: tokens at the start that are not predicted (a caption's prompt).
        padding: id of padding.
        smoothing: of the labels (captions: 0.1). The authors give the true word smoothing / V less than torch does.
    """
    wanted = ids.masked_fill(ids == padding, -100)
    wanted[:, :skip] = -100
    loss = F.cross_entropy(words[:, :-1].transpose(1, 2), wanted[:, 1:], reduction="none", label_smoothing=smoothing)
    return loss.sum(dim=1)


AutoConfig.register(XvlmConfig.model_type, XvlmConfig)
