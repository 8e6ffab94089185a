"""Backbones: one folder a family; what they have in common stands beside the folders.

To add a family, add its folder (see `family.py`) and its name to the list below.
"""

from __future__ import annotations

from importlib import import_module

from trimtab.backbones.base import Backbone, Encoded, Pictures
from trimtab.backbones.family import FAMILIES, Family, add
from trimtab.backbones.loading import (
    ARCHITECTURES,
    BACKBONES,
    assumed,
    build,
    convert_official,
    from_pretrained,
    is_architecture,
    load,
    load_model,
    only_counted,
)
from trimtab.backbones.official import FORMATS, LoadReport, load_official
from trimtab.backbones.pretraining import PretrainingLoss

__all__ = ["ARCHITECTURES", "BACKBONES", "FAMILIES", "FORMATS", "Backbone", "Encoded", "Family", "LoadReport",
           "Pictures", "PretrainingLoss", "add", "assumed", "build", "convert_official", "from_pretrained",
           "is_architecture", "load", "load_model", "load_official", "only_counted"]  # fmt: skip

for _name in (
    "meter",
    "vilt",
    "xvlm",
    "blip",
    "mdetr",
    "vse",
    "clip4clip",
    "clip_vil",
    "clip",
    "siglip",
    "reader",
    "dual",
    "vision",
    "described",
):
    add(import_module(f"{__name__}.{_name}").FAMILY)
