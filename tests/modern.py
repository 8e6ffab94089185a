"""Tiny models of today's vision-language families, members of the zoo like those in `tests.zoo`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf

from tests.zoo import (
    _DECODER,
    _QWEN,
    _READS,
    _SEEN_MASK,
    BLOCK,
    PICTURE,
    SMALL,
    VISION,
    WIDE,
    ZOO,
    Member,
    _qwen25,
    pixels,
)
from trimtab.anatomy import Anatomy

_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_GATED = BLOCK + 16 * 32  # gated feed-forward parts have a third matrix


def _sized(**changed: Any) -> dict[str, Any]:
    return {**_DECODER, "head_dim": 8, **changed}


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


_PATCHES = torch.ones(2, 4, 4, dtype=torch.long)
_PATCHES[1, :, 2:] = 0  # the second picture fills the left half
_SMOL = {
    **_READS, "pixel_values": pixels()[:, None],
    "pixel_attention_mask": _PATCHES.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None],
}  # fmt: skip
_PALIGEMMA = {**_READS, "pixel_values": pixels(), "token_type_ids": torch.tensor([[0] * 7 + [1] * 2] * 2)}
_TASK = torch.tensor([[29, 29, 29, 29, 29, 5, 6, 7], [29, 29, 29, 29, 29, 8, 0, 0]])
_DECODES = torch.tensor([[2, 4, 6, 8], [2, 7, 0, 0]])
_DECODER_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
_FLORENCE = {
    "input_ids": _TASK, "attention_mask": (_TASK > 0).long(), "pixel_values": pixels(), "decoder_input_ids": _DECODES,
    "decoder_attention_mask": _DECODER_MASK, "labels": _DECODES.masked_fill(_DECODES == 0, -100),
}  # fmt: skip
_NAMED = torch.tensor([[101, 5, 1012, 6, 102], [101, 9, 102, 0, 0]])
_PIXEL_MASK = torch.ones(2, 32, 32, dtype=torch.long)
_PIXEL_MASK[1, :, 16:] = 0
_GROUNDING = {
    "input_ids": _NAMED, "attention_mask": (_NAMED > 0).long(), "pixel_values": pixels(32), "pixel_mask": _PIXEL_MASK,
}  # fmt: skip
_GRIDS = torch.cat([_PIXEL_MASK[:, :: 32 // n, :: 32 // n].flatten(1) for n in (8, 4, 2)], dim=1)
_DEFORMABLE = 32 * 3 * 4 * 3 * 2 + 2 * 32 * 32  # offsets and weights of 4 heads, 3 grids, 2 points; value, output

_LANGUAGE: dict[str, Any] = {
    "masks": {"text": _SEEN_MASK},
    "padding": {"input_ids": _SEEN_MASK == 0},
    "generates": True,
}
_SEES = {"vision": ("vision", 3, 3 * WIDE)}

MODERN: dict[str, Member] = {
    **{
        name.lower(): Member(
            partial(idefics, name), _SMOL, {**_SEES, "text": ("text", 2, 2 * _GATED)}, {"vision": 16, "text": 9},
            {"text": _SEEN_MASK, "vision": _PATCHES.flatten(1)}, {"input_ids": _SEEN_MASK == 0}, generates=True,
        )
        for name in ("Idefics3", "SmolVLM")
    },
    "qwen3-vl": Member(
        qwen3, _QWEN, {"vision": ("vision", 3, 3 * (4 * 24 * 24 + 2 * 24 * 48)), "text": ("text", 3, 3 * _GATED)},
        {"vision": 16, "text": 9}, **_LANGUAGE,
    ),
    **{
        name: Member(
            partial(paligemma, text), _PALIGEMMA, {**_SEES, "text": ("text", 2, 2 * _GATED)}, {"vision": 4, "text": 9},
            **_LANGUAGE,
        )
        for name, text in (("paligemma", "gemma"), ("paligemma2", "gemma2"))
    },
    "florence2": Member(
        florence, _FLORENCE,
        {"vision": ("vision", 3, 16 * (8 * 8 + 2 * 16 * 16)), "encoder": ("text", 2, 2 * BLOCK),
         "decoder": ("text", 2, 2 * (BLOCK + 4 * 16 * 16))},
        {"vision": 16, "encoder": 8, "decoder": 4},
        {"encoder": (_TASK > 0).long(), "decoder": _DECODER_MASK},
        {"input_ids": _TASK == 0, "decoder_input_ids": _DECODER_MASK == 0},
        {"vision": [], "decoder": ["attention", "cross-attention", "mlp"]},
        generates=True, streams={"vision": [(2, 8, 4, 4), (2, 16, 2, 2), (2, 16, 2, 2)]},
    ),
    "grounding-dino": Member(
        grounding_dino, _GROUNDING,
        {"vision": ("vision", 4, 2 * 12 * (8 * 8 + 16 * 16) + 32 * 16), "text": ("text", 2, 2 * BLOCK),
         "fusion-image": ("fusion", 2, 2 * (_DEFORMABLE + 2 * 32 * 64 + 3 * 32 * 32)),
         "fusion-text": ("fusion", 2, 2 * (4 * 32 * 32 + 2 * 32 * 32 + 3 * 32 * 32)),
         "decoder": ("fusion", 2, 2 * (8 * 32 * 32 + _DEFORMABLE + 2 * 32 * 64))},
        {"vision": 64, "text": 5, "fusion-image": 84, "fusion-text": 5, "decoder": 3},
        {"text": (_NAMED > 0).long(), "fusion-text": (_NAMED > 0).long(), "fusion-image": _GRIDS},
        sublayers={"decoder": ["attention", "cross-attention", "cross-attention", "mlp"]},
        streams={"vision": [(2, 64, 8), (2, 64, 8), (2, 16, 16), (2, 16, 16)]},
        lossless=True,
    ),
}  # fmt: skip

MEMBERS = MODERN | {name: ZOO[name] for name in ("siglip", "siglip2", "qwen2.5-vl")}
# Members that write, with three blocks in their decoder.
DEEPER: dict[str, tuple[str, Callable[[], Any], str]] = {
    "smolvlm": ("smolvlm", partial(idefics, "SmolVLM", 3), "text"),
    "idefics3": ("idefics3", partial(idefics, "Idefics3", 3), "text"),
    "qwen2.5-vl": ("qwen2.5-vl", partial(_qwen25, 3), "text"),
    "qwen3-vl": ("qwen3-vl", qwen3, "text"),
    "paligemma": ("paligemma", partial(paligemma, "gemma", 3), "text"),
    "paligemma2": ("paligemma2", partial(paligemma, "gemma2", 3), "text"),
    "florence2": ("florence2", partial(florence, 3), "decoder"),
}


def deeper(name: str) -> tuple[Any, Member, list[str]]:
    """A model with three blocks in its decoder, its member of the zoo, and the decoder's blocks."""
    member, build, tower = DEEPER[name]
    model = Member(build, {}, {}, {}).model()
    return model, MEMBERS[member], [b.path for b in Anatomy.of(model).blocks(tower)]


def written(model: Any, member: Member, cache: bool) -> torch.Tensor:
    """The logits of five words in a row, (5, B, V)."""
    prompt = {k: v for k, v in member.batch.items() if not k.startswith(("labels", "decoder"))}
    # A model of 30 words would also write tokens that stand for pictures.
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [26, 27, 28, 29]}
    with torch.no_grad():
        out = model.generate(**prompt, **options, use_cache=cache, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits)


def outputs(model: Any, member: Member) -> list[torch.Tensor]:
    """All finite tensors that the model returns."""
    torch.manual_seed(1)
    with torch.no_grad():
        out = model(**member.batch).to_tuple()
    return [v[v.isfinite()] for v in out if isinstance(v, torch.Tensor) and v.is_floating_point()]
