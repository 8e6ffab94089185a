"""Tiny models of every family that has a description, with a batch of padded texts and pictures for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {**SMALL, "hidden_size": 24, "num_hidden_layers": 3}
PICTURE = {"image_size": 16, "patch_size": 8}  # four patches
BLOCK, WIDE = 4 * 16 * 16 + 2 * 16 * 32, 4 * 24 * 24 + 2 * 24 * 32  # weights of a block of either
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
MASK = (IDS > 0).long()
PADDING = {"input_ids": MASK == 0}


@dataclass
class Member:
    """A model and what is expected of it.

    Attributes:
        build: gives the model.
        batch: its arguments for two samples, with what its loss needs.
        towers: name -> modality, blocks, prunable weights.
        lengths: tower -> tokens of a sample in its stream.
        masks: tower -> its valid tokens (B, L); other towers have no padding.
        padding: argument -> where it is padding (of its shape, or of its first axes).
        sublayers: kinds of parts in a block, by tower; others have attention and mlp.
        generates: whether it writes text.
        streams: what each block puts out, by tower; others give (2, length, width).
        lossless: whether it computes no loss of its own from this batch.
    """

    build: Callable[[], nn.Module]
    batch: dict[str, Any]
    towers: dict[str, tuple[str, int, int]]
    lengths: dict[str, int]
    masks: dict[str, Tensor] = field(default_factory=dict)
    padding: dict[str, Tensor] = field(default_factory=dict)
    sublayers: dict[str, list[str]] = field(default_factory=dict)
    generates: bool = False
    streams: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    lossless: bool = False

    def model(self) -> Any:
        torch.manual_seed(0)
        model = self.build()
        for p in model.parameters():  # biases and small initial weights would make ties
            p.data = p.data + torch.randn_like(p) * 0.05
        return model.eval()

    def padded_otherwise(self) -> dict[str, Any]:
        """The batch with other values where it is padding."""
        other = dict(self.batch)
        for name, where in self.padding.items():
            other[name] = other[name].clone()
            other[name][where] += 3
        return other


def pixels(size: int = 16) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _dual(config: type, model: type, **options: Any) -> hf.PreTrainedModel:
    text = {**SMALL, "vocab_size": 30, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
    text |= {"projection_size": 24} if model is not hf.CLIPModel else {}
    return model(config(text_config=text, vision_config={**VISION, **PICTURE, **options}))


def _bridgetower(model: type) -> hf.PreTrainedModel:
    text = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {"hidden_size": 64, "num_hidden_layers": 3, **PICTURE}
    config = hf.BridgeTowerConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, text_config={**text, "vocab_size": 30},
        vision_config=vision,
    )  # fmt: skip
    return model(config)


def _t5(model: type, feed_forward: str = "relu") -> hf.PreTrainedModel:
    sizes = {"num_layers": 2, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 30}
    return model(hf.T5Config(**sizes, feed_forward_proj=feed_forward, decoder_start_token_id=0))


_DECODER = {
    **SMALL,
    "num_key_value_heads": 2,
    "vocab_size": 30,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _decoder(name: str) -> hf.PreTrainedModel:
    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**_DECODER, head_dim=8))


def _llava() -> hf.PreTrainedModel:
    vision = hf.CLIPVisionConfig(**VISION, **PICTURE)
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**_DECODER), image_token_index=29)
    return hf.LlavaForConditionalGeneration(config)


def _qwen2() -> hf.PreTrainedModel:
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 16, "patch_size": 4}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(vision_config=sizes, **_qwen_text()))


def _qwen25(layers: int = 2) -> hf.PreTrainedModel:
    sizes = {"hidden_size": 24, "depth": 3, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 16}
    sizes |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    return hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(vision_config=sizes, **_qwen_text(layers)))


def _qwen_text(layers: int = 2) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    tokens = {"image_token_id": 29, "video_token_id": 28, "vision_start_token_id": 27, "vision_end_token_id": 26}
    return {"text_config": {**_DECODER, "num_hidden_layers": layers, "rope_parameters": rope}, **tokens}


# Two rows of a language model: four image tokens, then text; the first is padded at its left.
_SEEN = torch.tensor([[0, 0, 29, 29, 29, 29, 5, 6, 7], [27, 29, 29, 29, 29, 26, 9, 8, 7]])
_SEEN_MASK = (_SEEN > 0).long()
_READS = {
    "input_ids": _SEEN, "attention_mask": _SEEN_MASK, "labels": _SEEN.masked_fill((_SEEN > 25) | (_SEEN == 0), -100),
}  # fmt: skip
_QWEN = {  # 4 x 4 patches a picture, merged by four
    **_READS, "pixel_values": torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1)),
    "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (_SEEN == 29).long(),
}  # fmt: skip
_DECODES = torch.tensor([[0, 4, 6, 8], [0, 7, 0, 0]])
_DECODER_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
_T5 = {
    "input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": _DECODES, "decoder_attention_mask": _DECODER_MASK,
}  # fmt: skip
_T5_PARTS = {
    "lengths": {"encoder": 5, "decoder": 4}, "masks": {"encoder": MASK, "decoder": _DECODER_MASK},
    "padding": {**PADDING, "decoder_input_ids": _DECODER_MASK == 0},
    "sublayers": {"decoder": ["attention", "cross-attention", "mlp"]},
}  # fmt: skip
_TEXT = {"input_ids": IDS, "attention_mask": MASK}
_PAIR = {**_TEXT, "pixel_values": pixels()}
_VILT_MASK = torch.cat([MASK, torch.ones(2, 5, dtype=torch.long)], dim=1)
_PATCHES = torch.randn(2, 6, 3 * 8 * 8, generator=torch.Generator().manual_seed(1))
_PATCH_MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
_BRIDGE = 64 * 64
_CROSS = 8 * _BRIDGE + 2 * 64 * 32
_BRIDGETOWER = {
    "towers": {
        "vision": ("vision", 3, 3 * (4 * _BRIDGE + 2 * 64 * 256)), "text": ("text", 3, 3 * (4 * _BRIDGE + 2 * 64 * 32)),
        # the shared transform in front of the fusion layers counts to them
        "fusion-text": ("fusion", 2, 2 * _CROSS + _BRIDGE), "fusion-image": ("fusion", 2, 2 * _CROSS + _BRIDGE),
    },
    "lengths": {"vision": 5, "text": 5, "fusion-text": 5, "fusion-image": 5},
    "masks": {"text": MASK, "fusion-text": MASK}, "padding": PADDING,
    "sublayers": {f"fusion-{of}": ["attention", "cross-attention", "mlp"] for of in ("text", "image")},
}  # fmt: skip
_ALONE = {"towers": {"vision": ("vision", 3, 3 * WIDE)}, "lengths": {"vision": 5}}
_WRITES = {"text": ("text", 2, 2 * (BLOCK + 16 * 32))}  # gated feed-forward parts have a third matrix
_CLASSES = torch.tensor([0, 1])

ZOO: dict[str, Member] = {
    "vilt": Member(
        lambda: hf.ViltForQuestionAnswering(hf.ViltConfig(**SMALL, **PICTURE, vocab_size=30, num_labels=3)),
        {**_PAIR, "labels": torch.eye(3)[:2]}, {"fusion": ("fusion", 2, 2 * BLOCK)}, {"fusion": 10},
        {"fusion": _VILT_MASK}, PADDING,
    ),
    "bert": Member(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=30)), {**_TEXT, "labels": _CLASSES},
        {"text": ("text", 2, 2 * BLOCK)}, {"text": 5}, {"text": MASK}, PADDING,
    ),
    "clip": Member(
        lambda: _dual(hf.CLIPConfig, hf.CLIPModel), {**_PAIR, "return_loss": True},
        {"vision": ("vision", 3, 3 * WIDE), "text": ("text", 2, 2 * BLOCK)}, {"vision": 5, "text": 5}, {"text": MASK},
        PADDING,
    ),
    "siglip": Member(
        lambda: _dual(hf.SiglipConfig, hf.SiglipModel), {**_PAIR, "return_loss": True},
        {"vision": ("vision", 3, 3 * WIDE), "text": ("text", 2, 2 * BLOCK)}, {"vision": 4, "text": 5}, {"text": MASK},
        PADDING,
    ),
    "siglip2": Member(
        lambda: _dual(hf.Siglip2Config, hf.Siglip2Model, num_patches=4),
        {**_TEXT, "pixel_values": _PATCHES, "pixel_attention_mask": _PATCH_MASK,
         "spatial_shapes": torch.tensor([[2, 2], [2, 3]]), "return_loss": True},
        # its patch embedding is a linear layer
        {"vision": ("vision", 3, 3 * WIDE + 3 * 8 * 8 * 24), "text": ("text", 2, 2 * BLOCK)}, {"vision": 6, "text": 5},
        {"vision": _PATCH_MASK, "text": MASK}, {**PADDING, "pixel_values": _PATCH_MASK == 0},
    ),
    "siglip classifier": Member(
        lambda: hf.SiglipForImageClassification(hf.SiglipConfig(vision_config={**VISION, **PICTURE})),
        {"pixel_values": pixels(), "labels": _CLASSES}, {"vision": ("vision", 3, 3 * WIDE)}, {"vision": 4},
    ),
    "bridgetower": Member(
        lambda: _bridgetower(hf.BridgeTowerForImageAndTextRetrieval), {**_PAIR, "labels": _CLASSES}, **_BRIDGETOWER
    ),
    "bridgetower mlm": Member(
        lambda: _bridgetower(hf.BridgeTowerForMaskedLM), {**_PAIR, "labels": IDS}, **_BRIDGETOWER
    ),
    "vit": Member(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, **PICTURE)),
        {"pixel_values": pixels(), "labels": _CLASSES}, **_ALONE,
    ),
    "vit masked": Member(
        lambda: hf.ViTForMaskedImageModeling(hf.ViTConfig(**VISION, **PICTURE, encoder_stride=8)),
        {"pixel_values": pixels(), "bool_masked_pos": torch.eye(4).bool()[:2]}, **_ALONE,
    ),
    "dinov2": Member(
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**VISION, **PICTURE, mlp_ratio=2)),
        {"pixel_values": pixels(), "labels": _CLASSES}, {"vision": ("vision", 3, 3 * (4 * 24 * 24 + 2 * 24 * 48))},
        {"vision": 5},
    ),
    "t5": Member(
        lambda: _t5(hf.T5ForConditionalGeneration), {**_T5, "labels": _DECODES},
        {"encoder": ("text", 2, 2 * BLOCK), "decoder": ("text", 2, 2 * (BLOCK + 4 * 16 * 16))}, **_T5_PARTS,
        generates=True,
    ),
    "t5 gated": Member(
        lambda: _t5(hf.T5Model, "gated-gelu"), _T5,
        {"encoder": ("text", 2, 2 * (BLOCK + 16 * 32)), "decoder": ("text", 2, 2 * (BLOCK + 4 * 16 * 16 + 16 * 32))},
        **_T5_PARTS, lossless=True,
    ),
    "t5 tokens": Member(
        lambda: _t5(hf.T5ForTokenClassification), {**_TEXT, "labels": MASK}, {"encoder": ("text", 2, 2 * BLOCK)},
        {"encoder": 5}, {"encoder": MASK}, PADDING,
    ),
    **{
        name.lower(): Member(
            partial(_decoder, name), {**_TEXT, "labels": IDS}, _WRITES, {"text": 5}, {"text": MASK}, PADDING
        )
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
    },
    "llava": Member(
        _llava, {**_READS, "pixel_values": pixels()}, {"vision": ("vision", 3, 3 * WIDE), **_WRITES},
        {"vision": 5, "text": 9}, {"text": _SEEN_MASK}, {"input_ids": _SEEN_MASK == 0}, generates=True,
    ),
    "qwen2-vl": Member(
        _qwen2, _QWEN, {"vision": ("vision", 3, 3 * (4 * 24 * 24 + 2 * 24 * 48)), **_WRITES},
        {"vision": 16, "text": 9}, {"text": _SEEN_MASK}, {"input_ids": _SEEN_MASK == 0}, generates=True,
    ),
    "qwen2.5-vl": Member(
        _qwen25, _QWEN, {"vision": ("vision", 3, 3 * (4 * 24 * 24 + 3 * 24 * 48)), **_WRITES},
        {"vision": 16, "text": 9}, {"text": _SEEN_MASK}, {"input_ids": _SEEN_MASK == 0}, generates=True,
    ),
}  # fmt: skip
