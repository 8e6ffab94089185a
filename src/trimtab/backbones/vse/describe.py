"""The anatomy of VSE-infinity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.anatomy import Anatomy, Tap, describes
from trimtab.backbones.described import bert
from trimtab.backbones.vse import resnet


@describes("VseInfinity")
def describe(model: Any) -> Anatomy:
    (text,) = bert.describe(model.txt_enc.bert).prefixed("txt_enc.bert").towers
    towers = [replace(text, pooled=Tap("txt_enc"), projected=Tap("txt_enc.linear"))]
    heads = ("txt_enc.bert.pooler", "txt_enc.linear", "txt_enc.gpool")
    if model.config.cnn is None:  # regions come ready made: there is no tower
        return Anatomy(tuple(towers), heads=(*heads, "img_enc"), ignored=("img_enc.mlp",))
    cnn = resnet.tower(model.img_enc.backbone.resnet, "img_enc.backbone.resnet", Tap("img_enc"))
    cnn = replace(cnn, projected=Tap("img_enc.image_encoder.fc"))
    return Anatomy((cnn, *towers), heads=(*heads, "img_enc.image_encoder"))
