"""Families of transformers and the class that stands for each."""

from __future__ import annotations

from transformers.models.auto import modeling_auto

# Mappings of transformers, the one whose class stands for a family first.
_TASKS = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "ZERO_SHOT_IMAGE_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION",
          "VISUAL_QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING", "TABLE_QUESTION_ANSWERING",
          "RETRIEVAL")  # fmt: skip
# Multimodal models that no such mapping names.
_FURTHER = {
    "bridgetower": "BridgeTowerModel", "flava": "FlavaModel", "groupvit": "GroupViTModel", "lxmert": "LxmertModel",
    "visual_bert": "VisualBertModel", "vision-text-dual-encoder": "VisionTextDualEncoderModel", "xclip": "XCLIPModel",
    "gemma3n_text": "Gemma3nForCausalLM",  # the whole needs timm
    "trocr": "TrOCRForCausalLM", "llava_next_video": "LlavaNextVideoForConditionalGeneration",
}  # fmt: skip
# They hand on to parts that are families of their own, and have no forward pass.
_WITHOUT_FORWARD = {"qwen2_5_omni", "qwen3_omni_moe"}


def _families() -> dict[str, str]:
    found: dict[str, str] = {}
    for task in _TASKS:
        for family, name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            found.setdefault(family, name if isinstance(name, str) else name[0])
    return {k: v for k, v in (_FURTHER | found).items() if k not in _WITHOUT_FORWARD}


FAMILIES = dict(sorted(_families().items()))
