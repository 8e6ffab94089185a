"""Tiny language models that read image tokens, with random weights, and what they are called with."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers as hf
from torch import nn

from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import DECODER, PALIGEMMA, PICTURE, READS, SMOL, VISION, pixels, sized


def llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(**VISION, **PICTURE)
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**DECODER), image_token_index=29)
    return hf.LlavaForConditionalGeneration(config)


def idefics(name: str, layers: int = 2, **changed: Any) -> hf.PreTrainedModel:
    """`Idefics3` or `SmolVLM`: 4 x 4 patches a picture, four of them one image token."""
    vision: dict[str, Any] = {**VISION, "image_size": 16, "patch_size": 4}
    text: dict[str, Any] = {"model_type": "llama", **sized(num_hidden_layers=layers), **changed}
    config = getattr(hf, f"{name}Config")(vision_config=vision, text_config=text, image_token_id=29, scale_factor=2,
                                          pad_token_id=0)  # fmt: skip
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


def paligemma(text: str = "gemma", layers: int = 2) -> hf.PreTrainedModel:
    vision: dict[str, Any] = {
        "model_type": "siglip_vision_model",
        **VISION,
        **PICTURE,
        "vision_use_head": False,
        "projection_dim": 16,
    }
    text_config: dict[str, Any] = {"model_type": text, **sized(num_hidden_layers=layers)}
    if text == "gemma2":
        text_config |= {"sliding_window": 4, "query_pre_attn_scalar": 8}
    config = hf.PaliGemmaConfig(vision_config=vision, text_config=text_config, image_token_id=29, projection_dim=16)
    return hf.PaliGemmaForConditionalGeneration(config)


EXAMPLES: dict[str, Example] = {
    "llava": Example("LLaVA", llava, {**READS, "pixel_values": pixels(2, 3, 16, 16)}),
    "idefics3": Example("Idefics3", partial(idefics, "Idefics3"), SMOL),
    "smolvlm": Example("SmolVLM", partial(idefics, "SmolVLM"), SMOL),
    "paligemma": Example("PaliGemma", paligemma, PALIGEMMA),
    "paligemma2": Example("PaliGemma 2", partial(paligemma, "gemma2"), PALIGEMMA),
}  # fmt: skip
