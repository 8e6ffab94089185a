"""Inputs of families that take what no other does: pictures in a form of their own, boxes, states, sounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.models.shrink import PICTURE
from tests.models.values import GRID, ROWS, WORDS, Batch, field, floats, side, vision, words

# --- pictures ---------------------------------------------------------------------------------------------------------


def plain(model: Any) -> Batch:
    """One picture a row, (B, C, H, W)."""
    size = side(model)
    out: Batch = {"pixel_values": floats(ROWS, getattr(vision(model), "num_channels", 3) or 3, size, size)}
    return out


def flat(model: Any) -> Batch:
    """The patches of all pictures one after another, (N, C T P P), with the grid of each (Qwen, GLM)."""
    config = vision(model)
    time = getattr(config, "temporal_patch_size", None) or getattr(config, "patch_temporal", None) or 1
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    values = floats(ROWS * GRID * GRID, channels * time * config.patch_size**2)
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, GRID, GRID]] * ROWS)}


def patches(model: Any) -> Batch:
    """The same as small pictures, (N, C, P, P)."""
    patch = vision(model).patch_size
    return {**flat(model), "pixel_values": floats(ROWS * GRID * GRID, 3, patch, patch)}


def shaped(model: Any) -> Batch:
    """Patches of each row, (B, N, C P P), padded, with their number in height and width (SigLIP 2)."""
    patch = vision(model).patch_size
    shapes = torch.tensor([[4, 4], [4, 2]])
    mask = (torch.arange(16) < shapes.prod(1)[:, None]).long()
    return {"pixel_values": floats(ROWS, 16, 3 * patch**2), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def whole_shaped(model: Any) -> Batch:
    """As `shaped`, without padding: the same number of tokens in every row."""
    out = shaped(model)
    return {**out, "pixel_attention_mask": torch.ones(ROWS, 16).long(), "spatial_shapes": torch.tensor([[4, 4]] * ROWS)}


def several(model: Any, number: int = 1) -> Batch:
    """Several pictures a row, (B, n, C, H, W)."""
    size = side(model)
    return {"pixel_values": floats(ROWS, number, 3, size, size)}


def sized(model: Any) -> Batch:
    """One picture a row with its height and width (Pixtral)."""
    size = side(model)
    return {**plain(model), "image_sizes": torch.tensor([[size, size]] * ROWS)}


def tiled(model: Any) -> Batch:
    """A small picture and two tiles a row, (B, 3, C, H, W), with the whole picture's height and width (LLaVA-NeXT)."""
    size = side(model)
    return {**several(model, 3), "image_sizes": torch.tensor([[size, 2 * size]] * ROWS)}


def two_resolutions(model: Any) -> Batch:
    size = model.config.high_res_vision_config.image_size
    return {**plain(model), "high_res_pixel_values": floats(ROWS, 3, size, size, seed=5)}


def in_one_row(model: Any) -> Batch:
    """All patches side by side in one picture of one row, (1, C, P, N P), with the grid of each (MiniCPM)."""
    patch = vision(model).patch_size
    return {"pixel_values": floats(1, 3, patch, ROWS * 16 * patch), "target_sizes": torch.tensor([[4, 4]] * ROWS)}


def placed(model: Any) -> Batch:
    """Patches of each row, (B, N, C P P), with the place of each (Gemma 4)."""
    config = vision(model)
    patch = getattr(config, "model_patch_size", config.patch_size)
    n = 6
    places = torch.stack(torch.meshgrid(torch.arange(n), torch.arange(n), indexing="xy"), -1).view(1, n * n, 2)
    return {"pixel_values": floats(ROWS, n * n, 3 * patch**2).sigmoid(),
            "image_position_ids": places.expand(ROWS, -1, -1).clone()}  # fmt: skip


def merged_sizes(model: Any) -> Batch:
    return {**flat(model), "image_merge_sizes": torch.ones(ROWS, dtype=torch.long)}


def gridded(model: Any) -> Batch:
    values = floats(ROWS * GRID * GRID, 3 * vision(model).patch_size ** 2)
    return {"pixel_values": values, "image_grid_hw": torch.tensor([[GRID, GRID]] * ROWS)}


def merged_patches(model: Any) -> Batch:
    """Patches already merged two by two, (n, 2 P, 2 P, C) (Inkling 2)."""
    patch, merge = vision(model).patch_size, vision(model).spatial_merge_size
    values = floats(ROWS * 4, merge * patch, merge * patch, 3)
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 2, 2]] * ROWS)}


def pooled_patches(model: Any) -> Batch:
    """Patches of one crop a row, (B, N, C P P), with the patches that each token pools (Molmo 2)."""
    patch = vision(model).patch_size
    grid = torch.arange(16).view(4, 4)
    one = grid.unfold(0, 2, 2).unfold(1, 2, 2).reshape(4, 4)
    pooling = torch.cat([one + 16 * i for i in range(ROWS)])
    return {"pixel_values": floats(ROWS, 16, 3 * patch**2), "image_token_pooling": pooling,
            "image_grids": torch.tensor([[2, 2, 0, 0]] * ROWS)}  # fmt: skip


def with_mask(model: Any) -> Batch:
    return {**several(model), "pixel_attention_mask": torch.ones(ROWS, 1).bool()}


def video(model: Any) -> Batch:
    """Frames of a video a row, (B, F, C, H, W)."""
    return several(model, getattr(vision(model), "num_frames", 2))


def cameras(model: Any) -> Batch:
    return {**several(model), "pixel_attention_mask": torch.ones(ROWS, 1).bool()}


def crops(model: Any) -> Batch:
    """The whole picture and one crop a row, with the patches that are none (Phi-4)."""
    size = side(model)
    mask = torch.ones(ROWS, 2, size // vision(model).patch_size, size // vision(model).patch_size)
    return {"image_pixel_values": several(model, 2)["pixel_values"], "image_attention_mask": mask.long(),
            "image_sizes": torch.tensor([[size, size]] * ROWS)}  # fmt: skip


def cubes(model: Any) -> Batch:
    """Two patches a row in time and space, (N, T, P, P, C) (Inkling)."""
    config = vision(model)
    return {"pixel_values": floats(2 * ROWS, config.temporal_patch_size, config.patch_size, config.patch_size, 3)}


def clip_of_frames(model: Any) -> Batch:
    return {"pixel_values_videos": video(model)["pixel_values"]}


def frames(model: Any) -> Batch:
    return {"pixel_values_videos": several(model, getattr(model.config, "frames_per_clip", 2))["pixel_values"]}


def small(model: Any) -> Batch:
    return {"pixel_values": floats(ROWS, 3, PICTURE, PICTURE)}


def pixels_of_patches(model: Any) -> Batch:
    config = model.config
    return {"pixel_values": floats(ROWS, 4, config.num_channels * config.patch_size**2)}


def flattened(model: Any) -> Batch:
    """Patches, (B, N, 2 + C P P), with their row and column before the pixels (Pix2Struct); some are padding."""
    places = torch.stack(torch.meshgrid(torch.arange(1, 4), torch.arange(1, 4), indexing="ij"), -1).view(1, 9, 2)
    pixels = floats(ROWS, 9, vision(model).patch_embed_hidden_size)
    return {"flattened_patches": torch.cat([places.expand(ROWS, -1, -1).float(), pixels], -1)}


def none(model: Any) -> Batch:
    """Words alone, of a model that may be shown pictures too."""
    return {}


def large(model: Any) -> Batch:
    """A picture of several patches in each direction of the smallest size that is looked at (Depth Pro)."""
    return {"pixel_values": floats(ROWS, 3, 4 * PICTURE, 4 * PICTURE)}


PICTURES: dict[str, Callable[[Any], Batch]] = {
    "kosmos-2.5": flattened, "florence2": small,
    "timesformer": video, "videomae": video, "vivit": video, "vjepa2": frames,
    "ultravbert": several, "videomt": clip_of_frames, "videoprism_vision_model": clip_of_frames,
    "colmodernvbert": several, "depth_pro": large, "deepseek_vl_hybrid": two_resolutions, "diffusion_gemma": placed,
    "emu3": sized,
    "fuyu": pixels_of_patches, "neomme": none, "gemma4": placed, "gemma4_unified": placed, "granite4_vision": tiled,
    "granite_docling": with_mask, "idefics": several, "idefics2": several, "idefics3": several, "inkling2":
    merged_patches, "inkling_mm_model": cubes, "instructblipvideo": video, "kimi_k25": patches, "lfm2_vl":
    whole_shaped, "lfm3_vl": flat, "lighton_ocr": sized, "llava_next": tiled, "llava_next_video": tiled,
    "llava_onevision": tiled, "minicpm_ocr": in_one_row, "minicpmv4_6": in_one_row, "minicpmv4_7": in_one_row,
    "mistral3": sized, "mistral_large4": sized, "modernvbert": several, "molmo2": pooled_patches, "nemotron_h_omni":
    gridded, "paddleocr_vl": patches, "phi4_multimodal": crops, "pi0": cameras, "smolvlm": several, "video_llama_3":
    merged_sizes, "videoprism": clip_of_frames, "xclip": video,
}  # fmt: skip


# --- what else --------------------------------------------------------------------------------------------------------


def boxes(rows: int, number: int, top: int = 1) -> torch.Tensor:
    """Boxes (rows, number, 4) with corners in order."""
    low = torch.rand(rows, number, 2, generator=torch.Generator().manual_seed(4)) * 0.5
    found = torch.cat([low, low + 0.4], -1)
    return (found * top).long() if top > 1 else found


def layout(model: Any, batch: Batch) -> Batch:
    return {"bbox": boxes(ROWS, batch["input_ids"].shape[1], 100)}


def udop(model: Any, batch: Batch) -> Batch:
    return {"bbox": boxes(ROWS, batch["input_ids"].shape[1])}


def tapas(model: Any, batch: Batch) -> Batch:
    return {"token_type_ids": torch.zeros(*batch["input_ids"].shape, 7, dtype=torch.long)}


def regions(model: Any, batch: Batch) -> Batch:
    """Features of regions of a picture, with their boxes (LXMERT)."""
    return {"visual_feats": floats(ROWS, 4, model.config.visual_feat_dim), "visual_pos": boxes(ROWS, 4)}


def visual_words(model: Any, batch: Batch) -> Batch:
    return {"visual_embeds": floats(ROWS, 4, model.config.visual_embedding_dim),
            "visual_token_type_ids": torch.ones(ROWS, 4).long()}  # fmt: skip


def pix2struct(model: Any) -> Batch:
    """Patches, and the text to write."""
    mask = torch.ones(ROWS, 9)
    mask[1, -2:] = 0
    return {**flattened(model), "attention_mask": mask, "decoder_input_ids": words(ROWS, 5)}


def kosmos(model: Any, batch: Batch) -> Batch:
    """Places of the picture's tokens among the words."""
    number = model.config.latent_query_num
    ids = torch.cat([words(ROWS, number, seed=3), batch["input_ids"]], 1)
    where = torch.zeros_like(ids)
    where[:, :number] = 1
    mask = torch.cat([torch.ones(ROWS, number).long(), batch["attention_mask"]], 1)
    return {"input_ids": ids, "image_embeds_position_mask": where, "attention_mask": mask}


def seen_by_words(model: Any, batch: Batch) -> Batch:
    """Which pictures each word sees (Idefics)."""
    return {"image_attention_mask": torch.ones(ROWS, batch["input_ids"].shape[1], 1).long()}


def mllama(model: Any, batch: Batch) -> Batch:
    tiles = vision(model).max_num_tiles
    size = side(model)
    length = batch["input_ids"].shape[1]
    ratios = torch.tensor([[1, 1]] * ROWS)[:, :1]
    mask = torch.zeros(ROWS, 1, tiles).long()
    mask[..., 0] = 1
    cross = torch.zeros(ROWS, length, 1, tiles).long()
    cross[..., 0] = 1
    return {"pixel_values": floats(ROWS, 1, tiles, 3, size, size), "aspect_ratio_ids": ratios,
            "aspect_ratio_mask": mask, "cross_attention_mask": cross}  # fmt: skip


def qformer(model: Any, batch: Batch) -> Batch:
    return {"qformer_input_ids": words(ROWS, 3, seed=6), "qformer_attention_mask": torch.ones(ROWS, 3).long()}


def robot(model: Any, batch: Batch) -> Batch:
    config = model.config
    steps = config.chunk_size
    return {"state": floats(ROWS, config.max_state_dim), "noise": floats(ROWS, steps, config.max_action_dim, seed=7),
            "timestep": torch.tensor([0.3, 0.7])}  # fmt: skip


def no_words_mask(model: Any, batch: Batch) -> Batch:
    return {"token_type_ids": torch.zeros_like(batch["input_ids"])}


def queries(model: Any, batch: Batch) -> Batch:
    """Two questions a picture, each a row of words (OWL-ViT)."""
    ids = words(2 * ROWS, WORDS)
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def gemma_types(model: Any, batch: Batch) -> Batch:
    token = field(model, "image_token_id", "image_token_index")
    return {"token_type_ids": (batch["input_ids"] == token).long()}


def heard_with_words(model: Any, batch: Batch) -> Batch:
    """Sounds that are added to the words, eight frames for each."""
    return {"input_features": floats(ROWS, model.config.audio_config.num_mel_bins, 8 * batch["input_ids"].shape[1])}


def codes(model: Any, batch: Batch) -> Batch:
    """Words with the codes of the sound beside them, (B, L, 1 + codebooks) (Kyutai)."""
    sounds = torch.randint(0, 16, (*batch["input_ids"].shape, model.config.num_codebooks),
                           generator=torch.Generator().manual_seed(8))  # fmt: skip
    return {"input_ids": torch.cat([batch["input_ids"][..., None], sounds], -1)}


def proteins(model: Any, batch: Batch) -> Batch:
    ids = words(ROWS, 9, seed=9) % 16 + 4
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"protein_input_ids": ids, "protein_attention_mask": mask}


def heard_in_windows(model: Any, batch: Batch) -> Batch:
    """Which of the features that are made of the sound count, not which of the sound (Granite)."""
    return {"input_features_mask": torch.ones(ROWS, NUMBERS["granite_speech"]).bool()}


def asked(model: Any, batch: Batch) -> Batch:
    """The task in words, as numbers (OneFormer)."""
    return {"task_inputs": words(ROWS, model.config.task_seq_len).float()}


ADDED: dict[str, Callable[[Any, Batch], Batch]] = {
    "granite_speech": heard_in_windows, "granite_speech_plus": heard_in_windows,
    "evolla": proteins, "gemma3": gemma_types, "idefics": seen_by_words, "kosmos-2": kosmos, "kosmos-2.5": kosmos,
    "kyutai_speech_to_text": codes, "layoutlm": layout, "layoutlmv3": layout, "lxmert": regions, "mllama": mllama,
    "oneformer": asked, "owlv2": queries, "owlvit": queries, "pi0": robot, "shieldgemma2": gemma_types,
    "tapas": tapas, "udop": udop, "visual_bert": visual_words, "voxtral_realtime": heard_with_words,
}  # fmt: skip
# Placeholders a row, where the part that sees cannot be asked.
NUMBERS: dict[str, int] = {
    "pi0": 16,
    "phi4_multimodal": 13,
    "qwen2_audio": 8,
    "granite_speech": 9,
    "granite_speech_plus": 9,
}
# Made before the pictures are looked at, which need it.
BEFORE: dict[str, Callable[[Any, Batch], Batch]] = {"instructblip": qformer, "instructblipvideo": qformer}
WHOLE: dict[str, Callable[[Any], Batch]] = {"pix2struct": pix2struct}
