"""BLIP (Li et al., ICML 2022): a picture is read by a text tower that understands or writes. transformers' classes, and
our `tiny-blip`.

    pixel_values -> vision tower -> (B, 1 + P, D) --keys, values--> cross-attention in every block of the text tower
    input_ids    -> text tower, every token sees every token  -> first token: do they match? what is the answer?
    input_ids    -> text tower, a token sees those before it  -> the next word
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.anatomy import Anatomy, Block, Sublayer, Tap, Tower, describes
from trimtab.backbones.base import (
    BACKBONES,
    CLIP_MEAN,
    CLIP_STD,
    WEIGHTS,
    Backbone,
    Encoded,
    Pictures,
    find_tokenizer,
    load_pretrained,
    read_pictures,
)
from trimtab.backbones.clip.features import without_pre_norm
from trimtab.backbones.official import own_class, own_model

own_model("BlipForMatchingAndCaptions", "trimtab.backbones.blip.model")

_TEXTS = {"text_model": "text", "text_encoder": "text", "text_decoder": "decoder"}  # attribute -> name of the tower


@describes("BlipForConditionalGeneration", "BlipForImageTextRetrieval", "BlipForQuestionAnswering", "BlipModel")
def describe(model: Any) -> Anatomy:
    layers = model.vision_model.encoder.layers
    towers = [Tower(
        "vision", "vision", tuple(vision_block(f"vision_model.encoder.layers.{i}", layer.embed_dim)
                                  for i, layer in enumerate(layers)),
        # Not the norm behind it: BLIP calls that twice, on the tokens and again on the first of them.
        ("vision_model",), output=Tap(f"vision_model.encoder.layers.{len(layers) - 1}"),
    )]  # fmt: skip
    for attribute, name in _TEXTS.items():
        text = getattr(model, attribute, None)
        if text is None:
            continue
        path = f"{attribute}.bert" if hasattr(text, "bert") else attribute
        blocks = tuple(
            _text_block(f"{path}.encoder.layer.{i}", model.config.text_config.hidden_size, hasattr(b, "crossattention"))
            for i, b in enumerate(model.get_submodule(path).encoder.layer)
        )
        # MULTIFLOW counts BLIP's encoder and decoder to one modality. A decoder of answers reads the question, which
        # has read the picture.
        memory = "text" if name == "decoder" and hasattr(model, "text_encoder") else "vision"
        towers.append(Tower(name, "text", blocks, (f"{path}.embeddings", f"{path}.encoder"), Tap(blocks[-1].path),
                            mask=Tap(path, "input", "attention_mask"), memory=memory,
                            causal=name == "decoder"))  # fmt: skip
    return Anatomy(tuple(towers), heads=_heads(model))


def _heads(model: Any) -> tuple[str, ...]:
    known = ("visual_projection", "text_projection", "vision_proj", "text_proj", "itm_head", "text_decoder.cls",
             "text_model.pooler")  # fmt: skip
    there = {name for name, _ in model.named_modules()}
    return tuple(name for name in known if name in there)


def vision_block(path: str, width: int) -> Block:
    return Block(path, width, (
        Sublayer("attention", Tap(f"{path}.layer_norm1", "input"), Tap(f"{path}.self_attn")),
        Sublayer("mlp", Tap(f"{path}.layer_norm2", "input"), Tap(f"{path}.mlp")),
    ))  # fmt: skip


def _text_block(path: str, width: int, crosses: bool) -> Block:
    parts = [Sublayer("attention", Tap(f"{path}.attention", "input"), Tap(f"{path}.attention.output.dense"))]
    if crosses:
        cross = f"{path}.crossattention"
        parts.append(Sublayer("cross-attention", Tap(cross, "input"), Tap(f"{cross}.output.dense")))
    parts.append(Sublayer("mlp", Tap(f"{path}.intermediate", "input"), Tap(f"{path}.output")))
    return Block(path, width, tuple(parts))


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


def load(folder: Path, name: str, pretrained: bool = True) -> BlipBackbone:
    """A folder of `BlipForMatchingAndCaptions`, or transformers' `BlipForConditionalGeneration`, which only writes."""
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model_class = own_class(architecture) or getattr(transformers, architecture)
    model = load_pretrained(model_class, folder, pretrained)
    size = model.config.vision_config.image_size
    # What was converted from its authors' file says so in its config, and has no preprocessor beside it.
    official = hasattr(model.config, "blip_task") and not (folder / "preprocessor_config.json").is_file()
    pictures = Pictures(size, CLIP_MEAN, CLIP_STD) if official else read_pictures(folder, size)
    return BlipBackbone(name, model, find_tokenizer(folder), pictures)


@BACKBONES.register("tiny-blip")
def tiny_blip(pretrained: bool = True) -> BlipBackbone:
    """8 vision and 4 text blocks, 128 wide, 64 px, patch 8; pretrained by us on Twemoji (docs/pretraining.md)."""
    return load(WEIGHTS / "tiny-blip", "tiny-blip", pretrained)
