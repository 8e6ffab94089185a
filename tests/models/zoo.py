"""Tiny models of every family that has a description, with a batch of padded texts and pictures for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from trimtab.backbones.described import examples as described
from trimtab.backbones.examples import EXAMPLES, inputs
from trimtab.backbones.examples.inputs import IDS, MASK, PICTURE, VISION

BLOCK, WIDE = 4 * 16 * 16 + 2 * 16 * 32, 4 * 24 * 24 + 2 * 24 * 32  # weights of a block of either
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


_T5_PARTS = {
    "lengths": {"encoder": 5, "decoder": 4}, "masks": {"encoder": MASK, "decoder": inputs.DECODER_MASK},
    "padding": {**PADDING, "decoder_input_ids": inputs.DECODER_MASK == 0},
    "sublayers": {"decoder": ["attention", "cross-attention", "mlp"]},
}  # fmt: skip
_TEXT = inputs.TEXT
_PAIR = inputs.PAIR
_VILT_MASK = torch.cat([MASK, torch.ones(2, 5, dtype=torch.long)], dim=1)
_PATCH_MASK = inputs.PATCHES["pixel_attention_mask"]
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


def _example(name: str) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    return EXAMPLES[name].build, EXAMPLES[name].batch


ZOO: dict[str, Member] = {
    "vilt": Member(
        *_example("vilt"), {"fusion": ("fusion", 2, 2 * BLOCK)}, {"fusion": 10},
        {"fusion": _VILT_MASK}, PADDING,
    ),
    "bert": Member(
        *_example("bert"),
        {"text": ("text", 2, 2 * BLOCK)}, {"text": 5}, {"text": MASK}, PADDING,
    ),
    "clip": Member(
        *_example("clip"),
        {"vision": ("vision", 3, 3 * WIDE), "text": ("text", 2, 2 * BLOCK)}, {"vision": 5, "text": 5}, {"text": MASK},
        PADDING,
    ),
    "siglip": Member(
        *_example("siglip"),
        {"vision": ("vision", 3, 3 * WIDE), "text": ("text", 2, 2 * BLOCK)}, {"vision": 4, "text": 5}, {"text": MASK},
        PADDING,
    ),
    "siglip2": Member(
        *_example("siglip2"),
        # its patch embedding is a linear layer
        {"vision": ("vision", 3, 3 * WIDE + 3 * 8 * 8 * 24), "text": ("text", 2, 2 * BLOCK)}, {"vision": 6, "text": 5},
        {"vision": _PATCH_MASK, "text": MASK}, {**PADDING, "pixel_values": _PATCH_MASK == 0},
    ),
    "siglip classifier": Member(
        lambda: hf.SiglipForImageClassification(hf.SiglipConfig(vision_config={**VISION, **PICTURE})),
        EXAMPLES["dino"].batch, {"vision": ("vision", 3, 3 * WIDE)}, {"vision": 4},
    ),
    "bridgetower": Member(
        *_example("bridgetower"), **_BRIDGETOWER,
    ),
    "bridgetower mlm": Member(
        lambda: described.bridgetower(hf.BridgeTowerForMaskedLM), {**_PAIR, "labels": IDS}, **_BRIDGETOWER
    ),
    "vit": Member(
        *_example("dino"), **_ALONE,
    ),
    "vit masked": Member(
        lambda: hf.ViTForMaskedImageModeling(hf.ViTConfig(**VISION, **PICTURE, encoder_stride=8)),
        {"pixel_values": inputs.pixels(2, 3, 16, 16), "bool_masked_pos": torch.eye(4).bool()[:2]}, **_ALONE,
    ),
    "dinov2": Member(
        *_example("dinov2"), {"vision": ("vision", 3, 3 * (4 * 24 * 24 + 2 * 24 * 48))},
        {"vision": 5},
    ),
    "t5": Member(
        *_example("t5"),
        {"encoder": ("text", 3, 3 * BLOCK), "decoder": ("text", 3, 3 * (BLOCK + 4 * 16 * 16))}, **_T5_PARTS,
        generates=True,
    ),
    "t5 gated": Member(
        lambda: described.t5(hf.T5Model, "gated-gelu"), inputs.T5,
        {"encoder": ("text", 3, 3 * (BLOCK + 16 * 32)), "decoder": ("text", 3, 3 * (BLOCK + 4 * 16 * 16 + 16 * 32))},
        **_T5_PARTS, lossless=True,
    ),
    "t5 tokens": Member(
        lambda: described.t5(hf.T5ForTokenClassification), {**_TEXT, "labels": MASK},
        {"encoder": ("text", 3, 3 * BLOCK)}, {"encoder": 5}, {"encoder": MASK}, PADDING,
    ),
    **{
        name.lower(): Member(
            partial(described.decoder, name), {**_TEXT, "labels": IDS}, _WRITES, {"text": 5}, {"text": MASK}, PADDING
        )
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
    },
    "llava": Member(
        # LLaVA reads the hidden state before the last block, which therefore belongs to nothing.
        *_example("llava"), {"vision": ("vision", 2, 2 * WIDE), **_WRITES},
        {"vision": 5, "text": 9}, {"text": inputs.SEEN_MASK}, {"input_ids": inputs.SEEN_MASK == 0}, generates=True,
    ),
    "qwen2-vl": Member(
        *_example("qwen2-vl"), {"vision": ("vision", 3, 3 * (4 * 24 * 24 + 2 * 24 * 48)), **_WRITES},
        {"vision": 16, "text": 9}, {"text": inputs.SEEN_MASK}, {"input_ids": inputs.SEEN_MASK == 0}, generates=True,
    ),
    "qwen2.5-vl": Member(
        *_example("qwen2.5-vl"), {"vision": ("vision", 3, 3 * (4 * 24 * 24 + 3 * 24 * 48)), **_WRITES},
        {"vision": 16, "text": 9}, {"text": inputs.SEEN_MASK}, {"input_ids": inputs.SEEN_MASK == 0}, generates=True,
    ),
}  # fmt: skip
