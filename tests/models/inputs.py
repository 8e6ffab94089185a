"""Inputs for a tiny model of any family, made from its configuration and the arguments of its forward pass.

Two rows that differ in words and pictures; the second is padded on the right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tests.models.exceptions import ADDED, PICTURES
from tests.models.shrink import PICTURE, VOCABULARY, configs

ROWS, WORDS, PADDED, GRID = 2, 7, 3, 4
Batch = dict[str, Any]


def floats(*shape: int, seed: int = 0) -> Tensor:
    """Numbers from N(0, 1)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(*shape: int, seed: int = 1) -> Tensor:
    """Numbers of words that stand for nothing special."""
    return torch.randint(10, VOCABULARY // 2, shape, generator=torch.Generator().manual_seed(seed))


def arguments(model: nn.Module) -> set[str]:
    """Names that the forward pass takes; where it hands on what it does not name, those of the model inside too."""
    found: set[str] = set()
    module: Any = model
    while module is not None:
        parameters = inspect.signature(module.forward).parameters
        found |= parameters.keys()
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        module = getattr(module, "model", None) if open_ended else None
    return found


def field(model: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that any of the model's configurations sets."""
    for name in names:
        for config in configs(model.config):
            if (value := getattr(config, name, None)) is not None:
                return value
    return default


def vision(model: Any) -> PreTrainedConfig:
    """The configuration of the part that sees."""
    for name in ("vision_config", "vision_tower_config", "image_config", "encoder"):
        if isinstance(found := getattr(model.config, name, None), PreTrainedConfig):
            return found
    thinker = getattr(model.config, "thinker_config", None)
    return thinker.vision_config if thinker is not None else model.config


# --- pictures ---------------------------------------------------------------------------------------------------------


def side(model: Any) -> int:
    size = getattr(vision(model), "image_size", None) or PICTURE
    return size if isinstance(size, int) else size[0]


def plain(model: Any) -> Batch:
    """One picture a row, (B, C, H, W)."""
    size = side(model)
    return {"pixel_values": floats(ROWS, getattr(vision(model), "num_channels", 3) or 3, size, size)}


def flat(model: Any) -> Batch:
    """The patches of all pictures one after another, (N, C T P P), with the grid of each (Qwen, GLM)."""
    config = vision(model)
    patch, time = config.patch_size, getattr(config, "temporal_patch_size", 1) or 1
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    values = floats(ROWS * GRID * GRID, channels * time * patch * patch)
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, GRID, GRID]] * ROWS)}


def shaped(model: Any) -> Batch:
    """Patches of each row, (B, N, C P P), padded, with their number in height and width (SigLIP 2)."""
    patch = vision(model).patch_size
    shapes = torch.tensor([[4, 4], [4, 2]])
    mask = (torch.arange(16) < shapes.prod(1)[:, None]).long()
    return {"pixel_values": floats(ROWS, 16, 3 * patch**2), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def several(model: Any, number: int = 1) -> Batch:
    """Several pictures a row, (B, n, C, H, W)."""
    size = side(model)
    return {"pixel_values": floats(ROWS, number, 3, size, size)}


LAYOUTS: dict[str, Callable[[Any], Batch]] = {"plain": plain, "flat": flat, "shaped": shaped, "several": several}


def pictures(model: Any, takes: set[str]) -> Batch:
    """What a model is shown; nothing if it sees none."""
    if (layout := PICTURES.get(model.config.model_type)) is not None:
        return layout(model) if callable(layout) else LAYOUTS[layout](model)
    if "pixel_values" not in takes:
        return {}
    if "image_grid_thw" in takes:
        return flat(model)
    return (shaped if "spatial_shapes" in takes else plain)(model)


def tokens_for(model: Any, seen: Batch) -> int:
    """How many placeholders a row's pictures take among its words, by running the part that sees."""
    look = getattr(model, "get_image_features", None) or getattr(getattr(model, "model", None), "get_image_features", 0)
    if not look or not seen:
        return 0
    takes = inspect.signature(look).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    with torch.no_grad():
        out = look(**{k: v for k, v in seen.items() if k in takes or open_ended})
    width = model.get_input_embeddings().weight.shape[-1]
    found = getattr(out, "pooler_output", None)
    found = out if found is None else found
    return sum(v.numel() for v in tensors(found)) // (width * ROWS)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in an output, in its order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "to_tuple"):
        yield from tensors(value.to_tuple())


# --- words ------------------------------------------------------------------------------------------------------------


def text(model: Any, takes: set[str], placeholders: int) -> Batch:
    """Words behind the placeholders of the pictures; the second row ends with padding."""
    ids = words(ROWS, WORDS)
    mask = torch.ones_like(ids)
    mask[1, -PADDED:] = 0
    ids[mask == 0] = field(model, "pad_token_id", default=0) or 0
    token = field(model, "image_token_id", "image_token_index")
    if placeholders and token is not None:
        front = torch.full((ROWS, placeholders), token)
        start, end = field(model, "vision_start_token_id", "image_start_token_id"), field(model, "vision_end_token_id")
        if start is not None:
            front = torch.cat([torch.full((ROWS, 1), start), front], dim=1)
        if end is not None:
            front = torch.cat([front, torch.full((ROWS, 1), end)], dim=1)
        ids = torch.cat([words(ROWS, 1, seed=3), front, ids], dim=1)
        mask = torch.cat([torch.ones(ROWS, ids.shape[1] - mask.shape[1], dtype=torch.long), mask], dim=1)
    out = {"input_ids": ids, "attention_mask": mask}
    if "mm_token_type_ids" in takes:
        out["mm_token_type_ids"] = (ids == token).long()
    return {k: v for k, v in out.items() if k in takes}


def inputs(model: Any) -> Batch:
    """The arguments of one forward pass of two rows.

    Raises:
        Exception: whatever the model raises when its pictures are counted.
    """
    takes = arguments(model)
    own = ADDED.get(model.config.model_type)
    if own is not None and getattr(own, "whole", False):
        return own(model)
    seen = pictures(model, takes)
    out: Batch = dict(seen)
    if "input_ids" in takes:
        out |= text(model, takes, tokens_for(model, seen))
    if "decoder_input_ids" in takes and getattr(model.config, "is_encoder_decoder", False):
        out["decoder_input_ids"] = words(ROWS, 5, seed=2)
    if own is not None:
        out |= own(model, out)
    return {k: v for k, v in out.items() if v is not None}
