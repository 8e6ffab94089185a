"""BLIP for tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.backbones.base import (
    CLIP_MEAN,
    CLIP_STD,
    WEIGHTS,
    Backbone,
    Encoded,
    Pictures,
    Unsupported,
    check_sizes,
    find_tokenizer,
    load_pretrained,
)
from trimtab.backbones.blip.pretraining import blip_loss
from trimtab.backbones.clip.features import without_pre_norm
from trimtab.backbones.family import model_class
from trimtab.backbones.pairs import PairBackbone
from trimtab.backbones.processed import own_pictures, read_pictures


def add_words(tokenizer: Any, model: Any) -> None:
    """Put BLIP's two tokens behind the words of a BERT's tokenizer, as its authors do, if they are not there yet."""
    start = model.config.text_config.bos_token_id
    if tokenizer is not None and len(tokenizer) == start:
        tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})


def write(model: Any, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Features of words (B, L, D) from a decoder that reads pictures; see `Backbone.write`."""
    input_ids = input_ids.clone()
    input_ids[:, 0] = model.config.text_config.bos_token_id  # the published models write from [DEC], not [CLS]
    out = model.text_decoder.bert(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen,
                                  is_decoder=True, use_cache=False)  # fmt: skip
    return out.last_hidden_state


def word_head(model: Any) -> tuple[nn.Linear, nn.LayerNorm, Tensor]:
    """The decoder's map from features to words; see `Backbone.word_head`."""
    head = model.text_decoder.cls.predictions
    return head.transform.dense, head.transform.LayerNorm, head.bias


class BlipBackbone(Backbone):
    """A BLIP that matches and writes, or one that only writes."""

    kind = "joint"

    def __init__(self, name: str, model: Any, tokenizer: Any, pictures: Pictures):
        text = model.config.text_config
        add_words(tokenizer, model)
        super().__init__(name, model, tokenizer, pictures, text.hidden_size, min(text.max_position_embeddings, 40))
        self.side = model.config.vision_config.image_size

    def adopt(self, tokenizer: Any) -> None:
        add_words(tokenizer, self.model)
        super().adopt(tokenizer)

    def look(self, pixel_values: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values=pixel_values).last_hidden_state

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        tokens = self.model.text_decoder.bert(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen, is_decoder=False,
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        return Encoded(tokens[:, 0], tokens, attention_mask)

    def write(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return write(self.model, seen, input_ids, attention_mask)

    @property
    def word_head(self) -> tuple[nn.Linear, nn.LayerNorm, Tensor]:
        return word_head(self.model)

    def match(self, encoded: Encoded) -> Tensor:
        """Logit that text and image belong together, (B,); ValueError if the model has no head for it."""
        if not hasattr(self.model, "itm_head"):
            raise ValueError(f"{self.name}: {type(self.model).__name__} has no head for matching")
        no, yes = self.model.itm_head(encoded.pooled).unbind(dim=-1)
        return yes - no

    @torch.no_grad()
    def start_from(self, other: Backbone) -> None:
        """Take the vision tower of a CLIP of the same sizes, as BLIP's starts from a pretrained vision transformer, and
        let the text tower begin by reading what that CLIP says of a picture.

        Raises:
            ValueError: if the two have other words or another width.
        """
        width = self.model.config.text_config.hidden_size
        if other.tokenizer.get_vocab() != self.tokenizer.get_vocab() or other.width != width:
            raise ValueError(
                f"{self.name} (width {width}) cannot start from {other.name!r} (vectors of {other.width}): their words "
                "and widths must be the same"
            )
        self._start_vision(other)
        self._start_text(other)

    def _start_text(self, other: Backbone) -> None:
        """A word begins as CLIP's vector of it, and every cross-attention as a look at the class token that gives
        CLIP's vector of the picture, so that what is in the picture is likelier to be said from the first step on."""
        text = self.model.text_decoder
        words = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        vectors = other.text(**other.texts([f"a {word}" for word in words])).pooled
        vectors = F.normalize(F.normalize(vectors, dim=-1) - F.normalize(vectors, dim=-1).mean(dim=0), dim=-1)
        text.get_input_embeddings().weight.copy_(vectors / 2)
        head = text.cls.predictions.transform.dense
        nn.init.eye_(head.weight)
        nn.init.zeros_(head.bias)
        colours = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
        seen = self.look(F.interpolate(colours, size=self.pictures.size, mode="nearest"))
        apart = seen[:, 0].mean(dim=0) - seen[:, 1:].mean(dim=(0, 1))  # the class token's way out of the patches
        gap, apart = apart.norm(), apart / apart.norm()
        for layer in text.bert.encoder.layer:
            cross = layer.crossattention
            size = cross.self.attention_head_size
            cross.self.key.weight[::size] = apart  # the first channel of each head
            cross.self.query.bias[::size] = 6 * size**0.5 / gap
            cross.self.value.weight.copy_(other.model.visual_projection.weight)
            cross.output.dense.weight.copy_(0.3 * torch.eye(len(apart)))

    def _start_vision(self, other: Backbone) -> None:
        source, own = other.model.vision_model, self.model.vision_model
        start = without_pre_norm(source)
        pairs = [
            (own.embeddings.patch_embedding.weight, start.patch), (own.embeddings.patch_embedding.bias, start.bias),
            (own.embeddings.class_embedding, start.token[None, None]),
            (own.embeddings.position_embedding, start.positions[None]),
            (own.post_layernorm.weight, source.post_layernorm.weight),
            (own.post_layernorm.bias, source.post_layernorm.bias),
        ]  # fmt: skip
        for mine, theirs in zip(own.encoder.layers, source.encoder.layers, strict=True):
            attention = theirs.self_attn
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            pairs += [
                (mine.self_attn.qkv.weight, torch.cat([p.weight for p in parts])),
                (mine.self_attn.qkv.bias, torch.cat([p.bias for p in parts])),
            ]
            names = {"self_attn.projection": "self_attn.out_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
                     "layer_norm1": "layer_norm1", "layer_norm2": "layer_norm2"}  # fmt: skip
            for a, b in names.items():
                left, right = mine.get_submodule(a), theirs.get_submodule(b)
                pairs += [(left.weight, right.weight), (left.bias, right.bias)]
        for target, value in pairs:
            target.copy_(value)


_ANSWERS = ("BlipForVqa",)  # classes whose decoder reads questions and leaves out their padding


def answer_loss(model: Any, questions: Tensor, mask: Tensor, answers: Tensor, answer_mask: Tensor) -> Tensor:
    """Sum of the losses of an answer's words, with the label smoothing of training, (N,); arguments (N, ...)."""
    return model.text_decoder(
        input_ids=answers, attention_mask=answer_mask, labels=answers.masked_fill(answer_mask == 0, -100),
        reduction="none", encoder_hidden_states=questions, encoder_attention_mask=mask,
    ).loss  # fmt: skip


def rank_answers(model: Any, questions: Tensor, mask: Tensor, answers: Tensor, answer_mask: Tensor, k: int) -> Tensor:
    """Which of a list of answers a `BlipForVqa` gives, as the authors rank them.

    The k likeliest by their first word are scored as a whole: by the sum of their words' losses, with the label
    smoothing of training.

    Args:
        questions: states of the questions after reading the pictures, (Q, L, D).
        mask: (Q, L).
        answers: ids of the answers, (A, M), that start with [DEC].
        answer_mask: (A, M).
        k: at most A.

    Returns:
        (Q,), rows of `answers`.
    """
    start = answers[:1, :1].expand(len(questions), 1)
    first = model.text_decoder(input_ids=start, encoder_hidden_states=questions, encoder_attention_mask=mask)
    likely = first.logits[:, 0].softmax(dim=-1)[:, answers[:, 1]]  # (Q, A)
    top = likely.topk(k, dim=1).indices  # (Q, k)
    ids, atts = answers[top.flatten()], answer_mask[top.flatten()]  # (Q * k, M)
    loss = answer_loss(model, questions.repeat_interleave(k, 0), mask.repeat_interleave(k, 0), ids, atts)
    best = loss.view(len(questions), k).argmin(dim=1)
    return top[torch.arange(len(top)), best]


class BlipOfficialBackbone(Backbone):
    """A BLIP that understands: its text encoder reads the picture, and its matching head judges. The pretrained has a
    decoder that reads pictures too, and writes."""

    kind = "joint"

    def __init__(self, name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None):
        if not hasattr(model, "text_encoder"):
            raise ValueError(f"{name}: {type(model).__name__} has no encoder of one picture and a text for our tasks; "
                             "load it with `trimtab.backbones.load_official`, or with task='retrieval'")  # fmt: skip
        text, vision = model.config.text_config, model.config.vision_config
        add_words(tokenizer, model)
        pictures = pictures or Pictures(vision.image_size, CLIP_MEAN, CLIP_STD)
        super().__init__(name, model, tokenizer, pictures, text.hidden_size, min(text.max_position_embeddings, 35))
        self.side = vision.image_size

    def look(self, pixel_values: Tensor) -> Tensor:
        """The vision tower alone, (B, 1+P, D); ValueError if the picture is of another size than the model's."""
        check_sizes("BLIP", pixel_values=pixel_values, side=self.model.config.vision_config.image_size)
        return self.model.vision_model(pixel_values=pixel_values).last_hidden_state

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """`pair` of what `look` returned; ValueError if the text is longer than the table of positions."""
        check_sizes("BLIP", input_ids, self.model.config.text_config.max_position_embeddings)
        # What reads a picture starts with [ENC] instead of [CLS] where the config names it, as in the authors' models.
        # transformers' classes do not know it: a folder of theirs is read as they read it.
        ids = input_ids.clone()
        ids[:, 0] = getattr(self.model.config, "enc_token_id", ids[:, 0])
        tokens = self.model.text_encoder(
            input_ids=ids, attention_mask=attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        return Encoded(tokens[:, 0], tokens, attention_mask)

    def adopt(self, tokenizer: Any) -> None:
        add_words(tokenizer, self.model)
        super().adopt(tokenizer)

    def write(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Words of the pretrained model's decoder; the decoder of one for VQA reads questions, and others have none."""
        if type(self.model).__name__ != "BlipPretraining":
            raise Unsupported(f"{self.name}: {type(self.model).__name__} has no decoder that reads pictures: "
                                      "task='caption' or task='pretrain' has")  # fmt: skip
        check_sizes("BLIP", input_ids, self.model.config.text_config.max_position_embeddings)
        return write(self.model, seen, input_ids, attention_mask)

    def pretraining_loss(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Contrast, matching and captions on a batch of pairs; NotImplementedError for what is fine-tuned."""
        if type(self.model).__name__ != "BlipPretraining":
            return super().pretraining_loss(pixel_values, input_ids, attention_mask)
        return blip_loss(self.model, pixel_values, input_ids, attention_mask)

    @property
    def word_head(self) -> tuple[nn.Linear, nn.LayerNorm, Tensor] | None:
        return word_head(self.model) if type(self.model).__name__ == "BlipPretraining" else None

    def match(self, encoded: Encoded) -> Tensor:
        """Logit that text and image belong together, (B,); ValueError if the model has no head for it."""
        if not hasattr(self.model, "itm_head"):
            raise ValueError(f"{self.name}: {type(self.model).__name__} has no head for matching: task='retrieval' has")
        no, yes = self.model.itm_head(encoded.pooled).unbind(dim=-1)
        return yes - no

    def rank(self, encoded: Encoded, similar: Tensor) -> Tensor:
        """The logit of "together" plus the similarity of the vectors, as `train_retrieval.py` adds them."""
        self.match(encoded)  # refuses a model without the head
        return self.model.itm_head(encoded.pooled)[:, 1] + similar

    def image_vector(self, seen: Tensor) -> Tensor:
        if not hasattr(self.model, "vision_proj"):
            return super().image_vector(seen)
        return F.normalize(self.model.vision_proj(seen[:, 0]), dim=-1)

    def text_vector(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if not hasattr(self.model, "text_proj"):
            return super().text_vector(input_ids, attention_mask)
        check_sizes("BLIP", input_ids, self.model.config.text_config.max_position_embeddings)
        text = self.model.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(self.model.text_proj(text[:, 0]), dim=-1)

    @property
    def temperature(self) -> Tensor:
        """Of the file if it has one; transformers' class for retrieval leaves it out."""
        if hasattr(self.model, "temp"):
            return self.model.temp.clamp(0.001, 0.5)  # as the authors keep it
        return super().temperature

    def answers(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if type(self.model).__name__ not in _ANSWERS:
            return super().answers(texts)
        found = self.texts(texts)
        found["input_ids"][:, 0] = self.model.config.text_config.bos_token_id  # [DEC], not [CLS]
        return found

    def answer_loss(self, question: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        if type(self.model).__name__ not in _ANSWERS:
            return super().answer_loss(question, mask, answer_ids, answer_mask)
        return answer_loss(self.model, question, mask, answer_ids, answer_mask)

    def rank_answers(self, question: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor, k: int) -> Tensor:
        if type(self.model).__name__ not in _ANSWERS:
            return super().rank_answers(question, mask, answer_ids, answer_mask, k)
        return rank_answers(self.model, question, mask, answer_ids, answer_mask, k)


class BlipPairBackbone(PairBackbone):
    """The BLIP of NLVR2, whose text encoder reads two pictures at once."""

    words = 35

    def __init__(self, name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None):
        add_words(tokenizer, model)
        super().__init__(name, model, tokenizer, pictures)

    def adopt(self, tokenizer: Any) -> None:
        add_words(tokenizer, self.model)
        super().adopt(tokenizer)

    def pair_of(self, first: Tensor, second: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """One vector (B, D): that of the first token; ValueError for a picture or text of a size not built for."""
        tokens = self.model.fuse(first, second, input_ids, attention_mask)
        return Encoded(tokens[:, 0], tokens, attention_mask)


def backbone(name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None) -> Backbone:
    """The model of an official file for tasks; its authors' preparation of pictures if none is given."""
    if type(model).__name__ == "BlipForNlvr2":
        return BlipPairBackbone(name, model, tokenizer, pictures)
    if type(model).__name__ == "BlipForConditionalGeneration":
        return BlipBackbone(
            name, model, tokenizer, Pictures(model.config.vision_config.image_size, CLIP_MEAN, CLIP_STD)
        )
    return BlipOfficialBackbone(name, model, tokenizer, pictures)


def load(folder: Path, name: str, pretrained: bool = True) -> Backbone:
    """A folder of one of transformers' classes or ours; with a tokenizer if there is one in it."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = load_pretrained(model_class(architecture), folder, pretrained)
    tokenizer = find_tokenizer(folder)
    if architecture not in ("BlipForMatchingAndCaptions", "BlipForConditionalGeneration"):
        return backbone(name, model, tokenizer, own_pictures(folder))
    config: Any = model.config
    size = config.vision_config.image_size
    pictures = read_pictures(folder, size, Pictures(size, CLIP_MEAN, CLIP_STD))
    return BlipBackbone(name, model, tokenizer, pictures)


def tiny_blip(pretrained: bool = True) -> Backbone:
    """8 vision and 4 text blocks, 128 wide, 64 px, patch 8; pretrained by us on drawn scenes (docs/pretraining.md)."""
    return load(WEIGHTS / "tiny-blip", "tiny-blip", pretrained)
