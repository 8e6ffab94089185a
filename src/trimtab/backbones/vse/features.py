"""VSE-infinity (Chen et al., CVPR 2021): image and text meet as two vectors, pooled by a learned operator (GPO).

image -> ResNeXt-101 WSL, or the detector's ResNet-101 -> grid (B, C, H/32, W/32) -> tokens (B, HW, C) --+
or regions of bottom-up attention, (B, R, 2048) ---------------------------------------------------------+
                                                       fc (+ MLP for regions) -> GPO -> L2 norm -> (B, E)
text -> BERT -> tokens (B, L, 768) -> linear -> GPO -> L2 norm -> (B, E)            similarity: dot products
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.anatomy import Anatomy, Tap, describes
from trimtab.backbones import resnet
from trimtab.backbones.base import Backbone, Encoded, Pictures, find_tokenizer, load_pretrained
from trimtab.backbones.described import bert
from trimtab.backbones.official import CheckpointError, Format, Item, Tensors, own_model, reads, renamed
from trimtab.backbones.resnet import ResNetSizes

own_model("VseInfinity", "trimtab.backbones.vse.model")


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


@reads("vse", "VSE-infinity")
class VseFormat(Format):
    """`model_best.pth`: image and text part in a list, `opt` beside it."""

    leftovers = (r"^0\.backbone\.(base|top)\.", r"^0\.backbone\.resnet\.fc\.", r"\.position_ids$")

    def recognises(self, keys: Collection[str]) -> bool:
        return "1.gpool.linear.weight" in keys and any(k.startswith("0.") for k in keys)

    def plan(self, state: Tensors, extras: dict[str, Any], *, text_heads: int | None = None) -> tuple[type, Any]:
        """Sizes from the tensors; `text_heads` if the BERT's heads are not 64 wide."""
        from trimtab.backbones.vse.model import VseConfig, VseInfinity

        options = vars(extras["opt"]) if hasattr(extras.get("opt"), "__dict__") else {}
        grid = "0.image_encoder.fc.weight" in state
        if not grid and "0.mlp.layers.0.weight" not in state:
            raise CheckpointError(f"{state.where}: has neither a grid's 0.image_encoder.fc nor a region's 0.mlp")
        fc = "0.image_encoder.fc.weight" if grid else "0.fc.weight"
        cnn = None
        if grid:
            try:
                cnn = ResNetSizes.infer(state, "0.backbone.resnet.", caffe=False, frozen=False)
            except ValueError as error:
                raise CheckpointError(f"{state.where}: {error}") from error
            # Only ResNeXt has groups, and it comes from torchvision; all plain ResNets are of the Caffe dialect here.
            cnn = replace(cnn, caffe=cnn.groups == 1)
        config = VseConfig(
            text_config=bert.infer(state, "1.bert.", text_heads).to_dict(), cnn=asdict(cnn) if cnn else None,
            features=state.size(fc, 1), embed=state.size(fc, 0),
            normalise_image=not options.get("no_imgnorm", False), normalise_text=not options.get("no_txtnorm", False),
        )  # fmt: skip
        return VseInfinity, config

    def weights(self, state: Tensors, extras: dict[str, Any], config: Any) -> Iterator[Item]:
        # The CNN is saved twice, as `resnet` and again in the pieces `base` and `top` that run it; one copy is read.
        image = r"0\.(?!backbone\.(?:base|top)\.|backbone\.resnet\.fc\.)(.+)"
        return renamed(state, [(image, r"img_enc.\1"), (r"1\.(?!.*position_ids$)(.+)", r"txt_enc.\1")])

    def backbone(self, name: str, model: Any, tokenizer: Any) -> VseBackbone:
        return VseBackbone(name, model, tokenizer)


class VseBackbone(Backbone):
    """A VSE-infinity that sees whole pictures, squashed to a square of 512 pixels as published."""

    kind = "dual"

    def __init__(self, name: str, model: Any, tokenizer: Any):
        if model.config.cnn is None:
            raise ValueError(f"{name}: reads regions of bottom-up attention, which are no pictures; "
                             "`trimtab.backbones.load_official` gives the plain model")  # fmt: skip
        self.caffe = bool(model.config.cnn["caffe"])
        pictures = Pictures(512, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        if self.caffe:  # detectors take bytes from which the mean is taken, nothing else; blue comes first
            mean = (122.7717 / 255, 115.9465 / 255, 102.9801 / 255)
            pictures = Pictures(512, mean, (1 / 255,) * 3)
        super().__init__(name, model, tokenizer, pictures, model.config.embed)

    def images(self, pictures: Any) -> dict[str, Tensor]:
        """PIL images -> `pixel_values` (B, 3, H, W)."""
        pixels = self.pictures(pictures)
        return {"pixel_values": pixels.flip(1) if self.caffe else pixels}

    def image(self, pixel_values: Tensor) -> Encoded:
        return Encoded(self.model.encode_image(pixel_values))

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        return Encoded(self.model.encode_text(input_ids, attention_mask))


def load(folder: Path, name: str, pretrained: bool = True) -> VseBackbone:
    """A folder that `trimtab convert` or `save_pretrained` wrote; with a tokenizer if there is one in it."""
    from trimtab.backbones.vse.model import VseInfinity

    return VseBackbone(name, load_pretrained(VseInfinity, folder, pretrained), find_tokenizer(folder))
