"""Tiny models of many of transformers' classes, with random weights, four blocks a list where that is cheap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers as hf

from trimtab.backbones.described import examples as described
from trimtab.backbones.examples.inputs import FLORENCE, GROUNDING, IDS, MASK, PAIR, QWEN, SEEN, SEEN_MASK, SMOL, pixels
from trimtab.backbones.reader import examples as reader

SIZE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
WORDS: dict[str, Any] = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**SIZE, **WORDS, "num_key_value_heads": 2, "head_dim": 8}
EYE: dict[str, Any] = {**SIZE, "image_size": 16, "patch_size": 8}
ASKS: dict[str, Any] = {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
LOOKS: dict[str, Any] = {"pixel_values": pixels(2, 3, 16, 16)}
BOTH: dict[str, Any] = {**PAIR}
READS: dict[str, Any] = {"input_ids": SEEN[1:], "attention_mask": SEEN_MASK[1:], "pixel_values": pixels(1, 3, 16, 16)}
STACKS: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 40, **WORDS, "decoder_start_token_id": 2,
}  # fmt: skip
DECODED: dict[str, Any] = {**ASKS, "decoder_input_ids": torch.tensor([[2, 4, 6]])}


class Many(NamedTuple):
    """A model, and what it is called with."""

    build: Callable[[], Any]
    example: dict[str, Any]


def _lm(name: str, **more: Any) -> Any:
    return getattr(hf, f"{name}ForCausalLM")(_config(name, **more))


def _config(name: str, suffix: str = "Config", **more: Any) -> Any:
    return getattr(hf, f"{name}{suffix}")(**{**TEXT, **more})


def _gemma3n() -> Any:
    return hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(
        **TEXT, hidden_size_per_layer_input=4, vocab_size_per_layer_input=30, laurel_rank=4, sliding_window=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"] * 2,
    ))  # fmt: skip


def _jamba() -> Any:
    return _lm("Jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
               num_experts=2, num_experts_per_tok=1, mamba_d_state=4, mamba_d_conv=2, mamba_expand=2, mamba_dt_rank=2,
               use_mamba_kernels=False)  # fmt: skip


def _mllama() -> Any:
    vision = {"hidden_size": 16, "num_hidden_layers": 4, "num_global_layers": 2, "attention_heads": 2,
              "intermediate_size": 32, "vision_output_dim": 32, "image_size": 16, "patch_size": 8, "max_num_tiles": 1,
              "intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1]]}  # fmt: skip
    text = {**TEXT, "cross_attention_layers": [1, 3], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    text.pop("head_dim")
    return hf.MllamaForConditionalGeneration(
        hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=29)
    )


def _blip2(kind: str) -> Any:
    config = getattr(hf, f"{kind}Config")
    options = {"vision_config": {**EYE}, "qformer_config": {**SIZE, "vocab_size": 30, "encoder_hidden_size": 16},
               "text_config": {"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 4, "ffn_dim": 32,
                               "num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 40,
                               **WORDS}, "num_query_tokens": 4, "image_token_index": 29}  # fmt: skip
    return getattr(hf, f"{kind}ForConditionalGeneration")(config(**options))


def _llava(name: str = "Llava", model: str = "", layer: Any = -2, **more: Any) -> Any:
    vision = hf.CLIPVisionConfig(**EYE)
    config = getattr(hf, f"{name}Config")(vision_config=vision, text_config=hf.LlamaConfig(**TEXT),
                                          image_token_index=29, vision_feature_layer=layer, **more)  # fmt: skip
    return getattr(hf, model or f"{name}ForConditionalGeneration")(config)


def _paired(name: str) -> Any:
    text = {**SIZE, **WORDS, "max_position_embeddings": 16}
    config = getattr(hf, f"{name}Config")(text_config=text, vision_config={**EYE}, projection_dim=8)
    return getattr(hf, f"{name}Model")(config)


def _blip(task: str = "QuestionAnswering") -> Any:
    text = {**SIZE, **WORDS, "max_position_embeddings": 16, "sep_token_id": 3, "encoder_hidden_size": 16}
    config = hf.BlipConfig(text_config=text, vision_config={**EYE}, projection_dim=8)
    return getattr(hf, f"BlipFor{task}")(config)


def _trocr() -> Any:
    return hf.TrOCRForCausalLM(hf.TrOCRConfig(
        vocab_size=30, d_model=16, decoder_layers=4, decoder_attention_heads=2, decoder_ffn_dim=32,
        max_position_embeddings=40, cross_attention_hidden_size=16, pad_token_id=0, eos_token_id=2,
    ))  # fmt: skip


def _kosmos2() -> Any:
    text = {"embed_dim": 16, "layers": 4, "ffn_dim": 32, "attention_heads": 2, "max_position_embeddings": 40, **WORDS}
    return hf.Kosmos2ForConditionalGeneration(hf.Kosmos2Config(text_config=text, vision_config={**EYE},
                                                               latent_query_num=4))  # fmt: skip


def _vitdet() -> Any:
    return hf.VitDetBackbone(hf.VitDetConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8,
        pretrain_image_size=32, window_size=2, window_block_indices=[0, 2], residual_block_indices=[1],
        out_features=["stage2", "stage4"],
    ))  # fmt: skip


def _beit() -> Any:
    return hf.BeitBackbone(hf.BeitConfig(**EYE, out_features=["stage1", "stage3"], reshape_hidden_states=True))


def _stages(name: str, **more: Any) -> Any:
    return getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(**more))


def _owlvit() -> Any:
    text = {**SIZE, **WORDS, "max_position_embeddings": 16}
    return hf.OwlViTForObjectDetection(hf.OwlViTConfig(text_config=text, vision_config={**EYE}, projection_dim=16))


KOSMOS = {"input_ids": torch.tensor([[1, 4, 5, 6, 7, 8, 9]]), "pixel_values": pixels(1, 3, 16, 16),
          "image_embeds_position_mask": torch.tensor([[0, 1, 1, 1, 1, 0, 0]])}  # fmt: skip
TILES = {**ASKS, "pixel_values": pixels(1, 1, 1, 3, 16, 16), "aspect_ratio_ids": torch.tensor([[1]]),
         "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
         "cross_attention_mask": torch.ones(1, 5, 1, 1, dtype=torch.long)}  # fmt: skip
QUERIES = {"input_ids": torch.tensor([[29, 29, 29, 29, 5, 6, 7]]), "pixel_values": pixels(1, 3, 16, 16)}
TILED = {"input_ids": torch.tensor([[29] * 10 + [5, 6]]), "pixel_values": pixels(1, 2, 3, 16, 16),
            "image_sizes": torch.tensor([[16, 16]])}  # fmt: skip
NAMED = {"input_ids": torch.tensor([[1, 5, 2], [1, 6, 2]]), "attention_mask": torch.ones(2, 3, dtype=torch.long),
         "pixel_values": pixels(1, 3, 16, 16)}  # fmt: skip
SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 4], "num_heads": [2, 2],
                        "window_size": 4}  # fmt: skip
FRAMES = {"input_ids": torch.tensor([[28] * 40 + [5, 6]]), "pixel_values_videos": pixels(1, 8, 3, 16, 16)}

MANY: dict[str, Many] = {
    "llama": Many(partial(_lm, "Llama"), ASKS),
    "gemma2": Many(partial(_lm, "Gemma2", sliding_window=4), ASKS),
    "gemma3": Many(lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TEXT, sliding_window=4)), ASKS),
    "gemma3n": Many(_gemma3n, ASKS),
    "smollm3": Many(partial(_lm, "SmolLM3", no_rope_layers=[1, 0, 1, 1]), ASKS),
    "qwen2": Many(partial(_lm, "Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2), ASKS),
    "qwen3-moe": Many(partial(_lm, "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
                              mlp_only_layers=[0, 2]), ASKS),
    "jamba": Many(_jamba, ASKS),
    "gpt2": Many(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(
        n_embd=16, n_layer=4, n_head=2, vocab_size=30, n_positions=40, scale_attn_by_inverse_layer_idx=True,
        bos_token_id=1, eos_token_id=2)), ASKS),
    "gpt-neo": Many(lambda: hf.GPTNeoForCausalLM(hf.GPTNeoConfig(
        hidden_size=16, num_layers=4, num_heads=2, attention_types=[[["global", "local"], 2]], window_size=2,
        vocab_size=30, max_position_embeddings=40, bos_token_id=1, eos_token_id=2)), ASKS),
    "t5": Many(lambda: hf.T5ForConditionalGeneration(hf.T5Config(
        num_layers=4, d_model=16, d_kv=8, d_ff=32, num_heads=2, vocab_size=30, decoder_start_token_id=0)), DECODED),
    "bart": Many(lambda: hf.BartForConditionalGeneration(hf.BartConfig(**STACKS)), DECODED),
    "trocr": Many(_trocr, ASKS),
    "mllama": Many(_mllama, TILES),
    "blip": Many(_blip, {**BOTH, "decoder_input_ids": torch.tensor([[1, 4], [1, 5]])}),
    "blip-captions": Many(partial(_blip, "ConditionalGeneration"), BOTH),
    "blip-2": Many(partial(_blip2, "Blip2"), QUERIES),
    "instructblip": Many(partial(_blip2, "InstructBlip"), {**QUERIES, "qformer_input_ids": IDS[:1]}),
    "llava": Many(_llava, READS),
    "llava-positive": Many(partial(_llava, layer=2), READS),
    "llava-next": Many(partial(_llava, "LlavaNext", image_grid_pinpoints=[[16, 16]]), TILED),
    "vip-llava": Many(partial(_llava, "VipLlava", layer=[-2, -4, 1]), READS),
    "video-llava": Many(partial(_llava, "VideoLlava", video_token_index=28), FRAMES),
    "paligemma": Many(partial(reader.paligemma, "gemma", 4), READS),
    "smolvlm": Many(partial(reader.idefics, "SmolVLM", 4), SMOL),
    "qwen2-vl": Many(described.qwen2_vl, QWEN),
    "qwen2.5-vl": Many(partial(described.qwen25_vl, 4), QWEN),
    "qwen3-vl": Many(partial(described.qwen3, 4), QWEN),
    "florence2": Many(partial(described.florence, 3), FLORENCE),
    "git": Many(lambda: hf.GitForCausalLM(hf.GitConfig(vision_config={**EYE}, **SIZE, **WORDS)), BOTH),
    "clip": Many(partial(_paired, "CLIP"), BOTH),
    "siglip": Many(lambda: hf.SiglipModel(hf.SiglipConfig(
        text_config={**SIZE, **WORDS, "max_position_embeddings": 16}, vision_config={**EYE})), BOTH),
    "bridgetower": Many(partial(described.bridgetower, hf.BridgeTowerForImageAndTextRetrieval), PAIR),
    "beit-backbone": Many(_beit, LOOKS),
    "dinov2-backbone": Many(lambda: hf.Dinov2Backbone(hf.Dinov2Config(
        **EYE, mlp_ratio=2, out_features=["stage1", "stage4"])), LOOKS),
    "vitdet": Many(_vitdet, {"pixel_values": pixels(1, 3, 32, 32)}),
    "yolos": Many(lambda: hf.YolosForObjectDetection(hf.YolosConfig(
        **{**EYE, "image_size": [16, 16]}, num_detection_tokens=3, use_mid_position_embeddings=True)), LOOKS),
    "vit": Many(lambda: hf.ViTForImageClassification(hf.ViTConfig(**EYE)), LOOKS),
    "swin": Many(partial(_stages, "Swin", **SWIN), {"pixel_values": pixels(2, 3, 32, 32)}),
    "convnext": Many(partial(_stages, "ConvNext", depths=[2, 3], hidden_sizes=[8, 16], num_stages=2), LOOKS),
    "kosmos-2": Many(_kosmos2, KOSMOS),
    "grounding-dino": Many(described.grounding_dino, GROUNDING),
    "owlvit": Many(_owlvit, NAMED),
}  # fmt: skip
