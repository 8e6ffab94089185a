"""Families of transformers and the class that stands for each: multimodal ones, and those that see or read alone."""

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


_SEEING = ("IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION",
           "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "IMAGE")  # fmt: skip
_WRITING = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM")


def _named(tasks: tuple[str, ...]) -> dict[str, str]:
    """Family -> class, by the first of the mappings that has it."""
    found: dict[str, str] = {}
    for task in tasks:
        for family, name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            found.setdefault(family, name if isinstance(name, str) else name[0])
    return found


def _sorted(found: dict[str, str], without: set[str]) -> dict[str, str]:
    return {family: found[family] for family in sorted(found) if family not in without}


FAMILIES = _sorted(_FURTHER | _named(_TASKS), _WITHOUT_FORWARD)
VISION = _sorted(_named(_SEEING), set(FAMILIES))
TEXT = _sorted(_named(_WRITING), {*FAMILIES, *VISION})
GROUPS = {"multimodal": FAMILIES, "vision": VISION, "text": TEXT}
CLASSES = FAMILIES | VISION | TEXT
