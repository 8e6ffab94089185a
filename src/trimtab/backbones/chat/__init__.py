"""Models that answer: any folder of transformers' `AutoModelForImageTextToText`, with its own processor.

conversation, pictures --processor (chat template)--> prompt --model.generate--> answer
conversation, pictures, answer ----> prompt + answer --model--> loss on the answer's tokens

SmolVLM, Idefics3, Qwen2.5-VL, Qwen3-VL, PaliGemma, the LLaVA family, InternVL, Gemma 3, BLIP-2, Florence-2 and others:
what differs between them stands in the folder's processor and chat template, and nothing of it is written here.
"""

from __future__ import annotations

from pathlib import Path

from trimtab.backbones.base import Backbone


def reads(model_type: str) -> bool:
    """Whether transformers has a model of that type that takes pictures and text and writes text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def load(folder: Path, name: str, pretrained: bool = True) -> Backbone:
    """A transformers folder as a model that answers; see `features.load`."""
    from trimtab.backbones.chat import features

    return features.load(folder, name, pretrained)
