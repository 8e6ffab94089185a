"""Builders of tiny models: the papers' backbones, and what transformers had at their time."""

from __future__ import annotations

from typing import Any

import transformers as hf
from torch import nn

from trimtab.backbones.clip4clip.model import Clip4Clip, Clip4ClipConfig
from trimtab.backbones.clip_vil.model import ClipVilConfig, ClipVilModel
from trimtab.backbones.dual.features import DualEncoder
from trimtab.backbones.examples.inputs import DECODER, PICTURE, SMALL, VISION
from trimtab.backbones.mdetr.model import Mdetr, MdetrConfig
from trimtab.backbones.meter.model import MeterConfig, MeterModel
from trimtab.backbones.vse.model import VseConfig, VseInfinity
from trimtab.backbones.xvlm.model import Xvlm, XvlmConfig

BERT = {**SMALL, "vocab_size": 30, "max_position_embeddings": 14}
CNN = {"layers": (1, 1, 1, 2), "stem": 4, "inner": 4}


def clip_text(**options: Any) -> dict[str, Any]:
    return {**SMALL, "vocab_size": 30, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2, **options}


def dual(config: type, model: type, **vision: Any) -> nn.Module:
    """A model of transformers of two towers."""
    text = clip_text(**({"projection_size": 24} if model is not hf.CLIPModel else {}))
    return model(config(text_config=text, vision_config={**VISION, **PICTURE, **vision}))


def bridgetower(model: type) -> nn.Module:
    text = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {"hidden_size": 64, "num_hidden_layers": 3, **PICTURE}
    config = hf.BridgeTowerConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, text_config={**text, "vocab_size": 30},
        vision_config=vision,
    )  # fmt: skip
    return model(config)


def t5(model: type, feed_forward: str = "relu") -> nn.Module:
    sizes = {"num_layers": 3, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 30}
    return model(hf.T5Config(**sizes, feed_forward_proj=feed_forward, decoder_start_token_id=0))


def decoder(name: str) -> nn.Module:
    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**DECODER, head_dim=8))


def llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(**VISION, **PICTURE)
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**DECODER), image_token_index=29)
    return hf.LlavaForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 16, "patch_size": 4}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(vision_config=sizes, **_qwen_text()))


def qwen25_vl(layers: int = 2) -> nn.Module:
    sizes = {"hidden_size": 24, "depth": 3, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 16}
    sizes |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    return hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(vision_config=sizes, **_qwen_text(layers)))


def _qwen_text(layers: int = 2) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    tokens = {"image_token_id": 29, "video_token_id": 28, "vision_start_token_id": 27, "vision_end_token_id": 26}
    return {"text_config": {**DECODER, "num_hidden_layers": layers, "rope_parameters": rope}, **tokens}


def meter() -> nn.Module:
    text = hf.RobertaConfig(**BERT, type_vocab_size=1)
    cross = hf.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    vision = hf.CLIPVisionConfig(**VISION, **PICTURE)
    heads = {"vqa": 3, "itm": 2}
    return MeterModel(MeterConfig(vision_config=vision, text_config=text, cross_config=cross, tasks=heads))


def xvlm(vision: dict[str, Any], task: str = "pretrain") -> nn.Module:
    text = {**BERT, "num_hidden_layers": 4}
    return Xvlm(XvlmConfig(text, vision, fusion_layer=2, embed=8, task=task, decoder_layers=2, local_layers=1))


SWIN = {
    "model_type": "swin", "image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2],
    "window_size": 8, "hidden_size": 16, "mlp_ratio": 2,
}  # fmt: skip
VIT = {"model_type": "clip_vision_model", **VISION, **PICTURE}


def blip(model: type) -> nn.Module:
    text = {**BERT, "encoder_hidden_size": 16, "bos_token_id": 28, "eos_token_id": 2, "sep_token_id": 2,
            "pad_token_id": 0}  # fmt: skip
    vision = {**VISION, **PICTURE, "hidden_size": 16}  # questions are read as pictures are: one width for both
    config = hf.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8)
    config.enc_token_id = 29
    return model(config)


def mdetr() -> nn.Module:
    text = hf.RobertaConfig(**BERT, type_vocab_size=1)
    sizes = {"width": 16, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "feed_forward": 32}
    return Mdetr(MdetrConfig(text, {**CNN, "frozen": True}, **sizes, queries=3, classes=6, align=8))


def vse(cnn: dict[str, Any] | None) -> nn.Module:
    return VseInfinity(VseConfig(dict(BERT), cnn, features=20 if cnn is None else 128, embed=16))


def clip4clip(head: str) -> nn.Module:
    config = hf.CLIPConfig(text_config=clip_text(), vision_config={**VISION, **PICTURE}, projection_dim=16)
    cross = {**SMALL, "max_position_embeddings": 8}
    return Clip4Clip(Clip4ClipConfig(config.to_dict(), cross, head))


def clip_vil() -> nn.Module:
    sizes = {"vision_width": 4, "vision_layers": (1, 2, 1, 1), "positions": 3, "pretraining_answers": 4}
    return ClipVilModel(ClipVilConfig(text_config=hf.BertConfig(**BERT), **sizes))


def lite0_minilm() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet
    from efficientnet_lite_pytorch.utils import get_model_params

    stages, sizes = get_model_params("efficientnet-lite0", {"image_size": 64, "num_classes": 2})
    return DualEncoder(EfficientNet(stages[:3], sizes), hf.BertModel(hf.BertConfig(**BERT)), width=16)
