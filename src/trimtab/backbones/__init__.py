"""One file a model family: load it, describe it for methods, feed it for tasks."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from trimtab.anatomy import Anatomy
from trimtab.backbones import (  # noqa: F401  (they register their descriptions)
    bert,
    blip,
    bridgetower,
    clip,
    decoder,
    dual,
    llava,
    siglip,
    t5,
    vilt,
    vit,
)
from trimtab.backbones.base import BACKBONES, Backbone, Encoded, Pictures
from trimtab.registry import unknown

__all__ = ["BACKBONES", "Backbone", "Encoded", "Pictures", "load", "load_model"]

_FAMILIES = {"vilt": vilt.load, "clip": clip.load, "blip": blip.load}


def load(name_or_path: str | Path, pretrained: bool = True) -> Backbone:
    """A backbone by registered name, or from a local transformers folder.

    Args:
        name_or_path: a name in `BACKBONES`, or a folder with config.json, safetensors weights and a tokenizer.
        pretrained: False gives the same model with fresh random weights.

    Raises:
        ValueError: if the name is unknown, or the folder's weights are truncated or do not fit its config.
        FileNotFoundError: if the folder lacks a file.
    """
    name = str(name_or_path)
    if name in BACKBONES:
        return BACKBONES[name](pretrained=pretrained)
    folder, family = _folder(name)
    if family not in _FAMILIES:
        raise ValueError(f"{folder / 'config.json'}: {unknown('model_type', str(family), _FAMILIES)}")
    return _FAMILIES[family](folder, name, pretrained)


def load_model(name_or_path: str | Path) -> tuple[nn.Module, Anatomy]:
    """A plain model and its anatomy: a registered backbone's, or of any transformers folder (weights are not read).

    Raises:
        ValueError: if the name is unknown, or no anatomy is registered and none can be discovered.
        FileNotFoundError: if the folder lacks config.json.
    """
    name = str(name_or_path)
    if name in BACKBONES:
        backbone = BACKBONES[name](pretrained=False)
        return backbone.model, backbone.anatomy
    folder, _ = _folder(name)
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):  # shapes are all that is asked for
        model = named._from_config(config) if named else transformers.AutoModel.from_config(config)
    return model, Anatomy.of(model)


def _folder(name: str) -> tuple[Path, str]:
    """A transformers folder and its model type."""
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"{unknown('backbone', name, BACKBONES)}; nor is there a folder of that name")
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder}: expected a transformers folder with config.json, found none")
    return folder, json.loads(config.read_text()).get("model_type")
