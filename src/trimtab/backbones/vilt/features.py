"""ViLT for tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.backbones.base import WEIGHTS, Backbone, Encoded, Pictures, check_sizes, find_tokenizer, load_pretrained
from trimtab.backbones.clip.features import without_pre_norm
from trimtab.backbones.pictures import extents
from trimtab.backbones.processed import Processed, read_pictures
from trimtab.registry import unknown


class ViltBackbone(Backbone):
    """A ViLT; matching starts from its ranking head (`ViltForImageAndTextRetrieval`) or that of its pretraining."""

    kind = "joint"
    reads_padding = True

    def __init__(self, name: str, model: Any, tokenizer: Any, pictures: Pictures | None = None):
        config = model.config
        longest = min(config.max_position_embeddings, 40)
        super().__init__(name, model, tokenizer, pictures or published(config), config.hidden_size, longest)

    def look(self, pixel_values: Tensor) -> Tensor:
        """Patch and position embeddings, (B, 1 + P, D), in row-major order; rows of zeros for padding.

        transformers' `visual_embed` computes the same and then draws a random order of the patches, image by image, in
        evaluation too. Position embeddings are added before, so that the order carries no meaning; a fixed one makes
        results repeatable and lets grounding know which token is which patch. Passed on as `image_embeds`.

        Raises:
            ValueError: if the sides of the pictures are no multiples of the patch.
        """
        step, size = self.model.config.patch_size, tuple(pixel_values.shape[2:])
        if any(side % step or side < step for side in size):
            raise ValueError(f"picture of {size[0]} x {size[1]}: ViLT takes multiples of its patch of {step} pixels")
        rows, columns = size[0] // step, size[1] // step
        embeddings = self.model.vilt.embeddings
        patches = embeddings.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)  # (B, P, D)
        tokens = torch.cat([embeddings.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        shapes = extents(pixel_values, step)
        if shapes is None:
            return embeddings.dropout(tokens + self._positions(rows, columns, rows, columns)[0])
        found = {shape: self._positions(*shape, rows, columns) for shape in set(shapes)}
        where = torch.cat([found[shape][0] for shape in shapes])  # (B, 1 + P, D)
        valid = torch.stack([found[shape][1] for shape in shapes])  # (B, 1 + P)
        return embeddings.dropout(tokens + where).masked_fill(~valid[..., None], 0)

    def _positions(self, rows: int, columns: int, high: int, wide: int) -> tuple[Tensor, Tensor]:
        """Position embeddings (1, 1 + P, D) of a picture of so many patches in a grid of `high` by `wide`, resized as
        the authors do in every forward pass, and which of the grid's places are picture, (1 + P,)."""
        table = self.model.vilt.embeddings.position_embeddings  # (1, 1 + side * side, D)
        side = self.model.config.image_size // self.model.config.patch_size
        there = torch.zeros(high, wide, dtype=torch.bool, device=table.device)
        there[:rows, :columns] = True
        valid = F.pad(there.flatten(), (1, 0), value=True)
        if (rows, columns, high, wide) == (side, side, side, side):
            return table, valid
        square = table[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        resized = F.interpolate(square, size=(rows, columns), mode="bilinear", align_corners=True)
        resized = F.pad(resized, (0, wide - columns, 0, high - rows)).flatten(2).transpose(1, 2)
        return torch.cat([table[:, :1], resized], dim=1), valid

    def grid(self, pixel_values: Tensor) -> tuple[int, int]:
        step = self.model.config.patch_size
        return pixel_values.shape[2] // step, pixel_values.shape[3] // step

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        return self._fused(seen, input_ids, attention_mask, 1)

    def pair_second(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        """As `pair`; the picture has token type 2, which a model for `nlvr2` has, else 1."""
        second = min(2, self.model.config.modality_type_vocab_size - 1)
        return self._fused(self.look(pixel_values), input_ids, attention_mask, second)

    def own_head(self, task: str) -> nn.Module | None:
        """The published classifier of NLVR2."""
        named = type(self.model).__name__ == "ViltForImagesAndTextClassification"
        return self.model.classifier if task == "pairs" and named else None

    def _fused(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor, image_type: int) -> Encoded:
        check_sizes("ViLT", input_ids, self.model.config.max_position_embeddings)
        valid = (seen != 0).any(dim=-1).long()
        out = self.model.vilt(input_ids=input_ids, attention_mask=attention_mask, image_embeds=seen, pixel_mask=valid,
                              image_token_type_idx=image_type)  # fmt: skip
        start = input_ids.shape[1] + 1  # after the text and the image's class token
        tokens = out.last_hidden_state  # (B, L + 1 + P, D)
        mask = torch.cat([attention_mask, valid], dim=1)
        return Encoded(out.pooler_output, tokens, mask, slice(start, tokens.shape[1]))

    def write(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # ViltModel lets every token see every valid one, so that its parts are called here with another mask: a word
        # sees the picture and the words up to itself, the picture sees itself (a "prefix" language model).
        vilt, length = self.model.vilt, input_ids.shape[1]
        valid = (seen != 0).any(dim=-1).long()
        tokens, mask = vilt.embeddings(input_ids, attention_mask, None, None, valid, None, seen)
        sees = mask.bool()[:, None, None, :].repeat(1, 1, tokens.shape[1], 1)  # (B, 1, L + 1 + P, L + 1 + P)
        sees[:, :, :length, :length] &= torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
        sees[:, :, length:, :length] = False
        barred = torch.zeros(sees.shape, dtype=tokens.dtype, device=seen.device)
        barred.masked_fill_(~sees, torch.finfo(tokens.dtype).min)
        return vilt.layernorm(vilt.encoder(tokens, attention_mask=barred)[0])[:, :length]

    @torch.no_grad()
    def start_from(self, other: Backbone) -> None:
        """Take patch, position and class embeddings and the blocks from a CLIP vision tower of the same sizes.

        ViLT itself starts from a pretrained vision transformer (section 3.1 of its paper).
        """
        source, own = other.model.vision_model, self.model.vilt
        start = without_pre_norm(source)
        text = own.embeddings.text_embeddings.LayerNorm
        pairs = [
            (own.embeddings.patch_embeddings.projection.weight, start.patch),
            (own.embeddings.patch_embeddings.projection.bias, start.bias),
            (own.embeddings.position_embeddings, start.positions[None]),
            (own.embeddings.cls_token, start.token[None, None]),
            # A word starts as the class token with a touch of itself: it reads the picture as the class token does.
            (text.bias, start.token),
            (text.weight, torch.full_like(start.token, 0.5)),
            (own.layernorm.weight, source.post_layernorm.weight),
            (own.layernorm.bias, source.post_layernorm.bias),
        ]
        names = {
            "attention.attention.query": "self_attn.q_proj", "attention.attention.key": "self_attn.k_proj",
            "attention.attention.value": "self_attn.v_proj", "attention.output.dense": "self_attn.out_proj",
            "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
            "layernorm_before": "layer_norm1", "layernorm_after": "layer_norm2",
        }  # fmt: skip
        for mine, theirs in zip(own.encoder.layer, source.encoder.layers, strict=True):
            for a, b in names.items():
                left, right = mine.get_submodule(a), theirs.get_submodule(b)
                pairs += [(left.weight, right.weight), (left.bias, right.bias)]
        for target, value in pairs:
            target.copy_(value)

    def match(self, encoded: Encoded) -> Tensor:
        """Logit that text and image belong together, (B,).

        Raises:
            ValueError: if the model has no head for it.
        """
        if hasattr(self.model, "rank_output"):
            return self.model.rank_output(encoded.pooled).squeeze(-1)
        if hasattr(self.model, "itm_score"):
            logits = self.model.itm_score(encoded.pooled)
            return logits[:, 1] - logits[:, 0]
        raise ValueError(f"{self.name}: {type(self.model).__name__} has no head for matching: load it with task='irtr'")


def published(config: Any) -> Processed:
    """Pictures as ViLT's authors prepare them: the shorter side as long as that of the square of positions (384), the
    longer at most 1333 / 800 of it, both cut down to whole patches; padded to the largest of a batch.

    transformers' processor does the same (`pixelbert_transform` in the authors' code).
    """
    from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

    settings: dict[str, Any] = {"size": {"shortest_edge": config.image_size}, "size_divisor": config.patch_size}
    return Processed.of(ViltImageProcessorPil(**settings))


def load(folder: Path, name: str, pretrained: bool = True) -> ViltBackbone:
    """A transformers ViLT folder: config.json, model.safetensors, and the tokenizer's files if it has any."""
    import json

    import transformers

    from trimtab.backbones.vilt.model import ViltForPretraining

    named = (json.loads((folder / "config.json").read_text()).get("architectures") or [""])[0]
    known = (
        transformers.ViltForQuestionAnswering,
        transformers.ViltForImagesAndTextClassification,
        transformers.ViltForImageAndTextRetrieval,
        transformers.ViltForMaskedLM,
        ViltForPretraining,
    )
    classes = {c.__name__: c for c in known}
    if named not in classes:
        raise ValueError(f"{folder / 'config.json'}: {unknown('architecture', named, classes)}")
    model_class = classes[named]
    model = load_pretrained(model_class, folder, pretrained)
    config: Any = model.config
    pictures = read_pictures(folder, config.image_size, published(config))
    return ViltBackbone(name, model, find_tokenizer(folder), pictures)


def tiny_vilt(pretrained: bool = True) -> ViltBackbone:
    """8 blocks, 128 wide, 64 px, patch 8; pretrained by us on drawn scenes (docs/pretraining.md)."""
    return load(WEIGHTS / "tiny-vilt", "tiny-vilt", pretrained)
