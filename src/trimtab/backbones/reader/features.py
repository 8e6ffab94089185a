"""Language models that read image tokens, for tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.backbones.base import CLIP_MEAN, CLIP_STD, Backbone, Encoded, Pictures, find_tokenizer, load_pretrained
from trimtab.backbones.processed import cut_into_tiles, read_pictures


class ReaderBackbone(Backbone):
    kind = "joint"

    def look(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) -> projected image tokens (B, P, D)."""
        if self.model.config.model_type in ("idefics3", "smolvlm"):
            pixel_values = pixel_values[:, None]  # one picture a sample
        seen = self.model.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        return seen if isinstance(seen, Tensor) else torch.stack(tuple(seen))

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        return self._read(seen, input_ids, attention_mask, suffix=False)

    def _read(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor, suffix: bool) -> Encoded:
        """PaliGemma's prefix (the picture, and a question) sees all of itself, a suffix (an answer) what stands before
        it; words of the others always see what stands before them alone."""
        inner = self.model.model
        words = inner.get_input_embeddings()(input_ids)
        mask = torch.cat([attention_mask.new_ones(seen.shape[:2]), attention_mask], dim=1)
        types = {}
        if self.model.config.model_type == "paligemma":  # without them it depends on padding who sees whom
            of_words = torch.full_like(attention_mask, int(suffix))
            types["token_type_ids"] = torch.cat([of_words.new_zeros(seen.shape[:2]), of_words], dim=1)
        tokens = inner(
            inputs_embeds=torch.cat([seen.to(words.dtype), words], dim=1), attention_mask=mask, use_cache=False, **types
        ).last_hidden_state
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
        pooled = tokens[torch.arange(len(tokens), device=tokens.device), last]  # the last word has seen all
        return Encoded(pooled, tokens, mask, slice(0, seen.shape[1]))

    def write(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self._read(seen, input_ids, attention_mask, suffix=True).tokens
        assert tokens is not None
        return tokens[:, seen.shape[1] :]


def load(folder: Path, name: str, pretrained: bool = True) -> ReaderBackbone:
    """A transformers folder of one of the families: config.json, model.safetensors, the tokenizer's files if any.

    Pictures are prepared as the folder's image processor does it; one that cuts pictures into tiles (Idefics3, SmolVLM)
    is followed in mean and deviation alone: features are taken of the whole picture, squashed to one tile. A folder
    without one gets squares of the vision tower's size, normalised as CLIP's or SigLIP's are.
    """
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    classes = {"llava": "Llava", "paligemma": "PaliGemma", "idefics3": "Idefics3", "smolvlm": "SmolVLM"}
    model: Any = load_pretrained(
        getattr(transformers, f"{classes[config.model_type]}ForConditionalGeneration"), folder, pretrained
    )
    vision, text = model.config.vision_config, model.config.text_config
    clip = (CLIP_MEAN, CLIP_STD) if "clip" in vision.model_type else ()
    side = vision.image_size
    pictures = read_pictures(folder, side, Pictures(side, *clip), tiles=True)
    found = ReaderBackbone(name, model, find_tokenizer(folder), pictures, text.hidden_size, 64)
    found.side, found.processor_files = side, cut_into_tiles(folder, pictures)
    return found
