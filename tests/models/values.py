"""Small values for inputs, and what a configuration says of a model's parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tests.models.shrink import PICTURE, STAGED_PICTURE, VOCABULARY, configs

ROWS, WORDS, PADDED, GRID = 2, 7, 3, 4
Batch = dict[str, Any]


def floats(*shape: int, seed: int = 0) -> Tensor:
    """Numbers from N(0, 1)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(*shape: int, seed: int = 1) -> Tensor:
    """Numbers of words that stand for nothing special."""
    return torch.randint(10, VOCABULARY // 2, shape, generator=torch.Generator().manual_seed(seed))


def field(model: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that any of the model's configurations sets, the outermost first."""
    for name in names:
        for config in configs(model.config):
            if (value := getattr(config, name, None)) is not None:
                return value
    return default


def vision(model: Any) -> PreTrainedConfig:
    """The configuration of the part that sees."""
    outer = getattr(model.config, "thinker_config", None) or getattr(model.config, "vlm_config", None) or model.config
    for name in ("vision_config", "vision_tower_config", "image_config", "encoder", "backbone_config"):
        if isinstance(found := getattr(outer, name, None), PreTrainedConfig):
            return getattr(found, "vision_config", None) or found
    return outer


def side(model: Any) -> int:
    """Height and width of its pictures."""
    config = vision(model)
    size = getattr(config, "image_size", None) or (STAGED_PICTURE if hasattr(config, "depths") else PICTURE)
    return size if isinstance(size, int) else size[0]
