"""Sizes and inputs that the tiny models share: two samples, the second one padded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
VISION: dict[str, Any] = {**SMALL, "hidden_size": 24, "num_hidden_layers": 3}
PICTURE: dict[str, Any] = {"image_size": 16, "patch_size": 8}  # four patches
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
MASK = (IDS > 0).long()
DECODER = {
    **SMALL, "num_key_value_heads": 2, "vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

BERT: dict[str, Any] = {**SMALL, "vocab_size": 30, "max_position_embeddings": 14}
CNN: dict[str, Any] = {"layers": (1, 1, 1, 2), "stem": 4, "inner": 4}


def sized(**changed: Any) -> dict[str, Any]:
    """A decoder's sizes, some of them changed, for a config whose heads have a size of their own."""
    return {**DECODER, "head_dim": 8, **changed}


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


TEXT: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK}
PAIR = {**TEXT, "pixel_values": pixels(2, 3, 16, 16)}
BIG_PAIR = {**TEXT, "pixel_values": pixels(2, 3, 64, 64)}  # for towers that halve the picture five times
# Two rows of a language model: four image tokens, then text; the first is padded at its left.
SEEN = torch.tensor([[0, 0, 29, 29, 29, 29, 5, 6, 7], [27, 29, 29, 29, 29, 26, 9, 8, 7]])
SEEN_MASK = (SEEN > 0).long()
READS = {
    "input_ids": SEEN, "attention_mask": SEEN_MASK, "labels": SEEN.masked_fill((SEEN > 25) | (SEEN == 0), -100),
}  # fmt: skip
QWEN = {  # 4 x 4 patches a picture, merged by four
    **READS, "pixel_values": pixels(32, 3 * 2 * 4 * 4),
    "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (SEEN == 29).long(),
}  # fmt: skip
DECODES = torch.tensor([[0, 4, 6, 8], [0, 7, 0, 0]])
DECODER_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
T5 = {
    "input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": DECODES, "decoder_attention_mask": DECODER_MASK,
}  # fmt: skip
PATCHES = {
    "pixel_values": pixels(2, 6, 3 * 8 * 8), "spatial_shapes": torch.tensor([[2, 2], [2, 3]]),
    "pixel_attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]),
}  # fmt: skip
CLASSES = torch.tensor([0, 1])

FRAMES = {**TEXT, "video": pixels(2, 3, 3, 16, 16), "video_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
QUESTION = {**PAIR, "decoder_input_ids": DECODES.clamp(min=1) * DECODER_MASK, "decoder_attention_mask": DECODER_MASK,
             "labels": DECODES.masked_fill(DECODER_MASK == 0, -100)}  # fmt: skip

# Of today's families.
PATCH_GRID = torch.ones(2, 4, 4, dtype=torch.long)
PATCH_GRID[1, :, 2:] = 0  # the second picture fills the left half
SMOL = {
    **READS, "pixel_values": pixels(2, 3, 16, 16)[:, None],
    "pixel_attention_mask": PATCH_GRID.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None],
}  # fmt: skip
PALIGEMMA = {**READS, "pixel_values": pixels(2, 3, 16, 16), "token_type_ids": torch.tensor([[0] * 7 + [1] * 2] * 2)}
TASK = torch.tensor([[29, 29, 29, 29, 29, 5, 6, 7], [29, 29, 29, 29, 29, 8, 0, 0]])
FLORENCE_DECODES = torch.tensor([[2, 4, 6, 8], [2, 7, 0, 0]])
FLORENCE = {
    "input_ids": TASK, "attention_mask": (TASK > 0).long(), "pixel_values": pixels(2, 3, 16, 16),
    "decoder_input_ids": FLORENCE_DECODES,
    "decoder_attention_mask": DECODER_MASK, "labels": FLORENCE_DECODES.masked_fill(FLORENCE_DECODES == 0, -100),
}  # fmt: skip
NAMED = torch.tensor([[101, 5, 1012, 6, 102], [101, 9, 102, 0, 0]])
PIXEL_MASK = torch.ones(2, 32, 32, dtype=torch.long)
PIXEL_MASK[1, :, 16:] = 0
GROUNDING = {
    "input_ids": NAMED, "attention_mask": (NAMED > 0).long(), "pixel_values": pixels(2, 3, 32, 32),
    "pixel_mask": PIXEL_MASK,
}  # fmt: skip
GRIDS = torch.cat([PIXEL_MASK[:, :: 32 // n, :: 32 // n].flatten(1) for n in (8, 4, 2)], dim=1)
