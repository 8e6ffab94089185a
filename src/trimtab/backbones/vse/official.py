"""VSE-infinity's checkpoint files as its authors published them, and its sizes without weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from typing import Any

from trimtab.backbones.official import CheckpointError, Format, Item, Tensors, bert_config, choose, renamed
from trimtab.backbones.vse.resnet import ResNetSizes


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
            text_config=bert_config(state, "1.bert.", text_heads).to_dict(), cnn=asdict(cnn) if cnn else None,
            features=state.size(fc, 1), embed=state.size(fc, 0),
            normalise_image=not options.get("no_imgnorm", False), normalise_text=not options.get("no_txtnorm", False),
        )  # fmt: skip
        return VseInfinity, config

    def weights(self, state: Tensors, extras: dict[str, Any], config: Any) -> Iterator[Item]:
        # The CNN is saved twice, as `resnet` and again in the pieces `base` and `top` that run it; one copy is read.
        image = r"0\.(?!backbone\.(?:base|top)\.|backbone\.resnet\.fc\.)(.+)"
        return renamed(state, [(image, r"img_enc.\1"), (r"1\.(?!.*position_ids$)(.+)", r"txt_enc.\1")])


def architecture(vision: str = "wsl") -> tuple[type, Any]:
    """VSE-infinity: ResNeXt-101 32x8d and BERT-base, to 1024.

    Args:
        vision: `wsl` (ResNeXt on pictures), `detector` (bottom-up attention's ResNet-101 on pictures) or `regions`
            (what it found, 2048 wide).
    """
    from trimtab.backbones.vse.model import VseConfig, VseInfinity

    sizes = {"wsl": ResNetSizes(inner=256, groups=32), "detector": ResNetSizes(caffe=True), "regions": None}
    cnn = choose("vision of VSE-infinity", vision, sizes)
    return VseInfinity, VseConfig(cnn=asdict(cnn) if cnn else None)
