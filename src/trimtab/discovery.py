"""Finding the towers of a model that nobody described: its repeated blocks, named and sorted by their paths."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from trimtab.anatomy import Anatomy, AnatomyError, Block, Modality, Tap, Tower

_VISION = re.compile(r"vis|image|img|patch|pixel|vit|swin|resnet|conv|stage")
_TEXT = re.compile(r"text|lang|bert|gpt|t5|llama|decoder|word|token|lm")
_FUSION = re.compile(r"cross|fusion|joint|multi_?modal|lxmert|qformer")


def repeated(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Outermost lists of two or more modules of one class that hold weights: (path, paths of the children)."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or any(path.startswith(f + ".") for f in found):
            continue
        children = [(f"{path}.{n}".lstrip("."), c) for n, c in module.named_children()]
        kinds = {type(c) for _, c in children}
        weighty = any(_matrices(m) for _, c in children for m in list(c.modules())[1:])
        if len(children) >= 2 and len(kinds) == 1 and weighty:
            found.append(path)
            yield path, [p for p, _ in children]


def discover(model: nn.Module) -> Anatomy:
    """Every list of repeated blocks as a tower; AnatomyError if there is none."""
    towers: list[Tower] = []
    for path, children in repeated(model):
        lowered = f"{path} {type(model.get_submodule(children[0])).__name__}".lower()
        modality: Modality = "vision"
        for name, pattern in (("fusion", _FUSION), ("vision", _VISION), ("text", _TEXT)):
            if pattern.search(lowered):
                modality = name  # type: ignore[assignment]
                break
        modules = [model.get_submodule(c) for c in children]
        widths = [_width(m) for m in modules]
        grid = any(isinstance(m, nn.Conv2d) for m in modules[0].modules()) and not any(
            isinstance(m, nn.Linear) for m in modules[0].modules()
        )
        blocks = tuple(Block(c, w, keeps_shape=len(set(widths)) == 1) for c, w in zip(children, widths, strict=True))
        towers.append(Tower(path or modality, modality, blocks, (path,) if path else tuple(children),
                            Tap(children[-1]), "grid" if grid else "tokens"))  # fmt: skip
    if not towers:
        raise AnatomyError(
            f"{type(model).__name__} has no list of repeated blocks to discover: describe it with an `Anatomy` of its "
            "own, or register a function with `@trimtab.describes('" + type(model).__name__ + "')`"
        )
    return Anatomy(tuple(towers), source=f"discovered in {type(model).__name__}; check it")


def _matrices(module: nn.Module) -> bool:
    """Whether a module multiplies by weights: linear, convolution, or transformers' transposed linear (`Conv1D`)."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "Conv1D"


def _width(block: nn.Module) -> int:
    """Channels that a block puts out: those of its first norm if it has one, else of its last linear or convolution."""
    last = 0
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            return module.normalized_shape[-1]
        if type(module).__name__.endswith("RMSNorm"):
            return next(module.parameters()).numel()
        last = getattr(module, "out_features", getattr(module, "out_channels", last))
    return last
