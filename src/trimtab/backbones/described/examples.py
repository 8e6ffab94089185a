"""Tiny models of transformers' classes that no family of ours has, and what they are called with."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers as hf
from torch import nn

from trimtab.backbones.examples import Example
from trimtab.backbones.examples.inputs import (
    CLASSES,
    DECODER,
    DECODES,
    FLORENCE,
    GROUNDING,
    IDS,
    PAIR,
    PICTURE,
    QWEN,
    SMALL,
    T5,
    TEXT,
    sized,
)


def bridgetower(model: type) -> nn.Module:
    text: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    vision: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, **PICTURE}
    config = hf.BridgeTowerConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, text_config={**text, "vocab_size": 30},
        vision_config=vision,
    )  # fmt: skip
    return model(config)


def t5(model: type, feed_forward: str = "relu") -> nn.Module:
    sizes: dict[str, Any] = {"num_layers": 3, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 30}
    return model(hf.T5Config(**sizes, feed_forward_proj=feed_forward, decoder_start_token_id=0))


def decoder(name: str) -> nn.Module:
    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**DECODER, head_dim=8))


_MROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": 29,
    "video_token_id": 28,
    "vision_start_token_id": 27,
    "vision_end_token_id": 26,
}
_QWEN_VISION: dict[str, Any] = {
    "hidden_size": 24,
    "depth": 3,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 16,
}


def qwen2_vl() -> nn.Module:
    sizes: dict[str, Any] = {
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 2,
        "mlp_ratio": 2,
        "hidden_size": 16,
        "patch_size": 4,
    }
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(vision_config=sizes, **_qwen_text()))


def qwen25_vl(layers: int = 2) -> nn.Module:
    sizes = {**_QWEN_VISION, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    return hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(vision_config=sizes, **_qwen_text(layers)))


def _qwen_text(layers: int = 2) -> dict[str, Any]:
    return {"text_config": {**DECODER, "num_hidden_layers": layers, "rope_parameters": {**_MROPE}}, **_QWEN_TOKENS}


def qwen3(layers: int = 3) -> hf.PreTrainedModel:
    """Qwen3-VL; the first two text blocks get features of the vision blocks 0 and 2 (DeepStack)."""
    sizes = {**_QWEN_VISION, "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}
    text = sized(num_hidden_layers=layers, rope_parameters={**_MROPE})
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(vision_config=sizes, text_config=text, **_QWEN_TOKENS))


def florence(layers: int = 2) -> hf.PreTrainedModel:
    """16 px: 4 x 4 patches in the first stage, 2 x 2 in the second, five image tokens with their mean."""
    vision: dict[str, Any] = {
        "embed_dim": [8, 16], "depths": [1, 2], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "num_heads": [2, 2], "num_groups": [2, 2], "window_size": 4, "mlp_ratio": 2.0,
        "projection_dim": 16, "max_position_embeddings": 4,
    }  # fmt: skip
    text: dict[str, Any] = {
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
    swin: dict[str, Any] = {
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


EXAMPLES: dict[str, Example] = {
    "t5": Example("T5", partial(t5, hf.T5ForConditionalGeneration), {**T5, "labels": DECODES}),
    "bridgetower": Example(
        "BridgeTower", partial(bridgetower, hf.BridgeTowerForImageAndTextRetrieval), {**PAIR, "labels": CLASSES}
    ),
    "bert": Example(
        "BERT", lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=30)),
        {**TEXT, "labels": CLASSES},
    ),
    "llama": Example("LLaMA, Mistral, Qwen", partial(decoder, "Llama"), {**TEXT, "labels": IDS}),
    "qwen2-vl": Example("Qwen2-VL", qwen2_vl, QWEN),
    "qwen2.5-vl": Example("Qwen2.5-VL", qwen25_vl, QWEN),
    "qwen3-vl": Example("Qwen3-VL", qwen3, QWEN),
    "florence2": Example("Florence-2", florence, FLORENCE),
    "grounding-dino": Example("Grounding DINO", grounding_dino, GROUNDING),
}  # fmt: skip
