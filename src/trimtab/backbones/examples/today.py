"""Builders of tiny models of today's vision-language families."""

from __future__ import annotations

from typing import Any

import transformers as hf

from trimtab.backbones.examples.inputs import DECODER, PICTURE, SMALL, VISION

_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _sized(**changed: Any) -> dict[str, Any]:
    return {**DECODER, "head_dim": 8, **changed}


def idefics(name: str, layers: int = 2, **changed: Any) -> hf.PreTrainedModel:
    """`Idefics3` or `SmolVLM`: 4 x 4 patches a picture, four of them one image token."""
    vision = {**VISION, "image_size": 16, "patch_size": 4}
    text = {"model_type": "llama", **_sized(num_hidden_layers=layers), **changed}
    config = getattr(hf, f"{name}Config")(vision_config=vision, text_config=text, image_token_id=29, scale_factor=2,
                                          pad_token_id=0)  # fmt: skip
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


def qwen3(layers: int = 3) -> hf.PreTrainedModel:
    """Qwen3-VL; the first two text blocks get features of the vision blocks 0 and 2 (DeepStack)."""
    sizes = {"hidden_size": 24, "depth": 3, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 16}
    sizes |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
    tokens = {"image_token_id": 29, "video_token_id": 28, "vision_start_token_id": 27, "vision_end_token_id": 26}
    text = _sized(num_hidden_layers=layers, rope_parameters=_MROPE)
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(vision_config=sizes, text_config=text, **tokens))


def paligemma(text: str = "gemma", layers: int = 2) -> hf.PreTrainedModel:
    vision = {"model_type": "siglip_vision_model", **VISION, **PICTURE, "vision_use_head": False, "projection_dim": 16}
    text_config: dict[str, Any] = {"model_type": text, **_sized(num_hidden_layers=layers)}
    if text == "gemma2":
        text_config |= {"sliding_window": 4, "query_pre_attn_scalar": 8}
    config = hf.PaliGemmaConfig(vision_config=vision, text_config=text_config, image_token_id=29, projection_dim=16)
    return hf.PaliGemmaForConditionalGeneration(config)


def florence(layers: int = 2) -> hf.PreTrainedModel:
    """16 px: 4 x 4 patches in the first stage, 2 x 2 in the second, five image tokens with their mean."""
    vision = {
        "embed_dim": [8, 16], "depths": [1, 2], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "num_heads": [2, 2], "num_groups": [2, 2], "window_size": 4, "mlp_ratio": 2.0,
        "projection_dim": 16, "max_position_embeddings": 4,
    }  # fmt: skip
    text = {
        "model_type": "bart", "d_model": 16, "encoder_layers": layers, "decoder_layers": layers,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "vocab_size": 30, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "forced_eos_token_id": None,
    }  # fmt: skip
    config = hf.Florence2Config(vision_config=vision, text_config=text, image_token_id=29, decoder_start_token_id=2,
                                pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return hf.Florence2ForConditionalGeneration(config)


def grounding_dino(model: type = hf.GroundingDinoForObjectDetection) -> hf.PreTrainedModel:
    """32 px: grids of 8 x 8 and 4 x 4 from Swin, and one of 2 x 2 made of the last; three queries."""
    swin = {
        "model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2],
        "window_size": 8, "out_indices": [1, 2],
    }  # fmt: skip
    config = hf.GroundingDinoConfig(
        backbone_config=swin, text_config={"model_type": "bert", **SMALL, "vocab_size": 1100}, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_n_points=2, decoder_n_points=2, num_feature_levels=3, num_queries=3,
        max_text_len=8,
    )  # fmt: skip
    return model(config)
