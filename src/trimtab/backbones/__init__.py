"""One file a model family: load it, describe it for methods, feed it for tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.anatomy import Anatomy
from trimtab.backbones import architectures
from trimtab.backbones.architectures import ARCHITECTURES
from trimtab.backbones.base import BACKBONES, Backbone, Encoded, Pictures
from trimtab.backbones.blip import features as blip
from trimtab.backbones.blip import official as blip_official
from trimtab.backbones.clip import features as clip
from trimtab.backbones.clip4clip import features as clip4clip
from trimtab.backbones.clip_vil import features as clip_vil
from trimtab.backbones.described import (  # noqa: F401  (they register their descriptions)
    bart,
    bert,
    bridgetower,
    decoder,
    florence2,
    grounding_dino,
    llava,
    swin,
    t5,
    vit,
)
from trimtab.backbones.dual import features as dual  # noqa: F401
from trimtab.backbones.mdetr import features as mdetr  # noqa: F401
from trimtab.backbones.meter import features as meter
from trimtab.backbones.official import FORMATS, LoadReport, load_official, own_class
from trimtab.backbones.pretraining import Pretraining
from trimtab.backbones.reader import features as reader
from trimtab.backbones.siglip import features as siglip
from trimtab.backbones.vilt import features as vilt
from trimtab.backbones.vilt import official as vilt_official  # noqa: F401
from trimtab.backbones.vse import features as vse
from trimtab.backbones.xvlm import features as xvlm
from trimtab.registry import unknown

__all__ = ["ARCHITECTURES", "BACKBONES", "FORMATS", "Backbone", "Encoded", "LoadReport", "Pictures", "Pretraining",
           "is_architecture", "load", "load_model", "load_official"]  # fmt: skip

_FAMILIES = {
    "vilt": vilt.load, "clip": clip.load, "blip": blip.load, "clip_vil": clip_vil.load, "meter": meter.load,
    "siglip": siglip.load, "siglip2": siglip.load,
    **dict.fromkeys(("llava", "paligemma", "idefics3", "smolvlm"), reader.load),
    "trimtab_vse": vse.load, "trimtab_clip4clip": clip4clip.load, "trimtab_xvlm": xvlm.load,
}  # fmt: skip


def load(name_or_path: str | Path, pretrained: bool = True, tokenizer: Any = None, **settings: Any) -> Backbone:
    """A backbone by registered name, from a local transformers folder, or from a checkpoint file of its authors.

    Args:
        name_or_path: a name in `BACKBONES`, a folder with config.json and safetensors weights, a file whose format
            is recognised from the names of its tensors (`FORMATS`), or a name in `ARCHITECTURES`, which has no weights.
        pretrained: False gives the same model with fresh random weights (not for files).
        tokenizer: a tokenizer, or the folder of one, in place of the backbone's own. Files hold none, nor do folders
            that were converted from them; without it texts must be given as ids there.
        settings: for files, of their format, such as `image_size`; for architectures, those of their function.

    Raises:
        ValueError: if the name is unknown, the weights are truncated, missing, or do not fit, weights are asked for of
            an architecture, or there are settings for what is neither a file nor an architecture.
        FileNotFoundError: if the folder lacks a file.
    """
    name = str(name_or_path)
    if Path(name).is_file() and name not in BACKBONES:
        model, report = load_official(name, **settings)
        backbone = FORMATS[report.format].backbone(name, model, None)
        backbone.load_report = report
    elif is_architecture(name):
        if pretrained:
            raise ValueError(
                f"{name}: an architecture, which has no weights: give the path of a checkpoint file or of a folder in "
                "its place, or take random weights (pretrained: false); `trimtab cost` needs none"
            )
        backbone = architectures.backbone(name, **settings)
    elif settings:
        raise ValueError(f"{name}: {', '.join(settings)}: only official checkpoint files and architectures have "
                         "settings")  # fmt: skip
    elif name in BACKBONES:
        backbone = BACKBONES[name](pretrained=pretrained)
    else:
        backbone = _from_folder(name, pretrained)
    if isinstance(tokenizer, (str, Path)):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer is not None:
        backbone.adopt(tokenizer)
    return backbone


def is_architecture(name: str) -> bool:
    """Whether a name stands for an architecture: a backbone or a folder of that name comes first."""
    return name in ARCHITECTURES and name not in BACKBONES and not Path(name).exists()


def _from_folder(name: str, pretrained: bool) -> Backbone:
    folder, family, architecture = _folder(name)
    if architecture in blip_official.CLASSES and architecture != "BlipForConditionalGeneration":
        return blip_official.load(folder, name, pretrained)
    if family not in _FAMILIES:
        raise ValueError(f"{folder / 'config.json'}: {unknown('model_type', str(family), _FAMILIES)}")
    return _FAMILIES[family](folder, name, pretrained)


def load_model(name_or_path: str | Path) -> tuple[nn.Module, Anatomy]:
    """A plain model and its anatomy: a registered backbone's, of any transformers folder (weights are not read), of an
    official checkpoint file, or of an architecture.

    Raises:
        ValueError: if the name is unknown, the file cannot be used, or no anatomy is registered or discovered.
        FileNotFoundError: if the folder lacks config.json.
    """
    name = str(name_or_path)
    if name in BACKBONES:
        backbone = BACKBONES[name](pretrained=False)
        return backbone.model, backbone.anatomy
    if Path(name).is_file():
        model, _ = load_official(name)
        return model, Anatomy.of(model)
    import torch

    if is_architecture(name):
        with torch.device("meta"):
            model = architectures.build(name)
        return model, Anatomy.of(model)
    folder, _, architecture = _folder(name)
    import transformers

    named = own_class(architecture) or getattr(transformers, architecture, None)
    config = transformers.AutoConfig.from_pretrained(folder)  # after our class is imported, which makes it known
    with torch.device("meta"):  # shapes are all that is asked for
        model = named._from_config(config) if named else transformers.AutoModel.from_config(config)
    return model, Anatomy.of(model)


def _folder(name: str) -> tuple[Path, str, str]:
    """A transformers folder, its model type and the class that it names."""
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"{unknown('backbone', name, [*BACKBONES, *ARCHITECTURES])}; nor is there a folder of that "
                         "name")  # fmt: skip
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder}: expected a transformers folder with config.json, found none")
    content = json.loads(config.read_text())
    return folder, content.get("model_type"), (content.get("architectures") or [""])[0]
