"""What the rules of `tests.models.shrink` and `tests.models.inputs` get wrong, by family or by a part of one.

A key is the `model_type` of a family, or of a part (`glm4v_text`), which several families may share.
"""

from __future__ import annotations

from typing import Any

_SECTIONS: dict[str, Any] = {"rope_parameters": {"mrope_section": [2, 1, 1]}}
_DEEP_FLOAT: dict[str, Any] = {"depths": (1, 1), "embed_dim": 16, "num_heads": (2, 2), "window_size": 2}
_SAM: dict[str, Any] = {"image_size": 32, "window_size": 2, "patch_size": 4, "global_attn_indexes": (1,),
                        "downsample_channels": [32, 48], "output_channels": 32}  # fmt: skip
_VQ: dict[str, Any] = {"base_channels": 32, "channel_multiplier": (1, 1), "num_res_blocks": 1, "embed_dim": 8,
                       "latent_channels": 32, "resolution": 16, "num_embeddings": 16}  # fmt: skip
_TILES: dict[str, Any] = {"image_grid_pinpoints": [[16, 32], [32, 16]]}
_LETTERS = {"<image>": 127, **{f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 64 + i for i in range(16)}}
_TOKENS = {"<image>": 127, "<|extra_200|>": 110, **{f"<|visual token {i:06d}|>": 64 + i for i in range(16)}}
_DETECTOR: dict[str, Any] = {
    "backbone_config": {"image_size": 32, "patch_size": 4, **_DEEP_FLOAT, "out_indices": (1, 2)},
    "num_queries": 4, "num_feature_levels": 3, "max_text_len": 16, "d_model": 32,
}  # fmt: skip

# Fields of a small configuration that are set to these values; dictionaries are merged.
SETTINGS: dict[str, dict[str, Any]] = {
    "align_vision_model": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 32, "in_channels": [32,
        16, 24], "out_channels": [16, 24, 32], "kernel_sizes": [3, 3, 5], "strides": [1, 2, 2], "num_block_repeats":
        [1, 1, 2], "expand_ratios": [1, 2, 2], "hidden_dim": 32, "depthwise_padding": []},
    "aria": {"projector_patch_to_query_dict": {16: 4}, "max_value_projector_patch_to_query_dict": 4},
    "blip-2": {"image_token_index": 127},
    "bridgetower": {"vision_config": {"hidden_size": 64, "image_size": 16}, "text_config": {"hidden_size": 64},
        "hidden_size": 64},
    "chameleon": {"vocabulary_map": _LETTERS, "vq_config": _VQ},
    "cosmos3_edge_text": _SECTIONS,
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1]}}},
    "deepseek_ocr2": {"vision_config": {"sam_config": {**_SAM, "downsample_channels": [32, 32]}}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "dots3_note_text": {"layer_types": ["indexed_attention", "sliding_attention", "sliding_attention"],
        "q_lora_rank": 8, "index_topk": 8, "head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "num_key_value_heads": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "emu3": {"vocabulary_map": _TOKENS, "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1, 1, 1],
        "num_res_blocks": 1, "codebook_size": 16, "embed_dim": 8, "hidden_size": 32, "attn_resolutions": [2]}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"mrope_section": [1, 1, 2]}, "moe_intermediate_size": [16, 16],
        "moe_num_experts": 4},
    "florence_vision": {"depths": (1, 1), "patch_size": (3, 3), "patch_stride": (2, 2), "patch_padding": (1, 1),
        "patch_prenorm": (False, True), "embed_dim": (16, 32), "num_heads": (2, 4), "num_groups": (2, 4),
        "window_size": 4, "max_position_embeddings": 8},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.95,
        0.0, 0.0], "intermediate_size": 40, "layer_types": ["sliding_attention", "full_attention",
        "sliding_attention", "full_attention"]},
    "gemma4_unified_vision": {"patch_size": 2, "output_proj_dims": 32},
    "gemma4_vision": {"patch_size": 2},
    "glm46v_text": _SECTIONS,
    "glm4v_moe_text": {**_SECTIONS, "head_dim": 16},
    "glm4v_text": _SECTIONS,
    "glm_ocr_text": _SECTIONS,
    "glmasr_encoder": {"intermediate_size": 192},
    "granite4_vision": {**_TILES, "downsample_rate": "1/2", "deepstack_layer_map": [[1, 0], [2, 1]],
        "spatial_target_layers": [2], "vision_config": {"hidden_size": 64}},
    "granite_speech": {"projector_config": {"encoder_hidden_size": 48}},
    "granite_speech_plus": {"projector_config": {"encoder_hidden_size": 48}},
    "grounding-dino": _DETECTOR,
    "hunyuan_vl_text": {**_SECTIONS, "head_dim": 8},
    "inkling2": {"quantization_config": None},
    "inkling_vision": {"n_layers": 4},
    "instructblip": {"image_token_index": 127},
    "instructblipvideo": {"video_token_index": 127},
    "janus": {"vq_config": {**_VQ, "num_patches": 4}, "vision_config": {"num_image_tokens": 16}},
    "kimi_k25_vision": {"pos_emb_height": 8, "pos_emb_width": 8},
    "kyutai_speech_to_text": {"num_codebooks": 2, "codebook_vocab_size": 20},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "llama4": {"vision_config": {"vision_output_dim": 48, "intermediate_size": 192, "projector_input_dim": 48,
        "projector_output_dim": 48}},
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "mimi": {"upsample_groups": 16, "num_filters": 4, "hidden_size": 32, "upsampling_ratios": [2, 4],
        "codebook_dim": 16},
    "minicpm_ocr": {"image_token_id": 127},
    "minicpmv4_6": {"image_token_id": 127},
    "minicpmv4_7": {"image_token_id": 127},
    "mistral_large4_text": {"kv_source_layers": [0, 1, 2], "index_topk": 8},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 2], "vision_output_dim": 144, "hidden_size": 48},
    "mm-grounding-dino": _DETECTOR,
    "molmo2": {"vision_config": {"image_size": [16, 16], "num_position_embeddings": 16, "patch_size": 4},
        "adapter_config": {"vision_feature_layer": [2, 1]}},
    "moss_transcribe_diarize_audio": {"max_source_positions": 16},
    "muse_glimmer": {"out_hidden_size": 192},
    "muse_spark": {"out_hidden_size": 192},
    "muse_spark_audio": {"patch_sizes": (4, 2), "hidden_sizes": (16, 32), "depths": (1, 1), "num_hidden_layers": 2},
    "nemotron_h": {"ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "nemotron_h_omni": {"image_token_id": 127},
    "paddleocr_vl_text": _SECTIONS,
    "phi4_multimodal_vision": {"crop_size": 16},
    "qwen2_5_omni_text": _SECTIONS,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 100, "vision_end_token_id": 101},
    "qwen2_5_vl_text": _SECTIONS,
    "qwen2_audio_encoder": {"max_source_positions": 16},
    "qwen2_vl_text": _SECTIONS,
    "qwen2_vl_vision": {"hidden_size": 32},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 100, "vision_end_token_id": 101},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2},
    "radio": {"max_img_size": 32, "patch_dim": 48, "video_patch_dim": 96},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "step3p5": {"sliding_window": 8},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "udop": {"decoder_start_token_id": 0},
    "unlimited_ocr": {"vision_config": {"sam_config": _SAM}},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "downsampling_ratios": (2, 4), "depths": (1, 1, 1)},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "videoprism_vision_model": {"image_size": 12, "tubelet_size": (1, 4, 4), "num_frames": 4},
    "vision-encoder-decoder": {"decoder_start_token_id": 0},
    "voxtral": {"audio_token_id": 127},
    "voxtral_encoder": {"intermediate_size": 192, "max_source_positions": 16},
}  # fmt: skip

# What the default configuration is made with, where a part is left out otherwise.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "gemma4_unified": {"vision_config": {"model_type": "gemma4_unified_vision"}},
}
