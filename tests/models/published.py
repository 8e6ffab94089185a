"""Tiny random checkpoint files in the layouts in which the papers' authors published theirs.

The names and shapes of the tensors are those that the authors' own classes have at tiny sizes
(`shapes.json`); the values are drawn here.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.backbones.official import LoadReport, build_official

SHAPES: dict[str, dict[str, list[Any]]] = json.loads(Path(__file__).with_name("shapes.json").read_text())


@dataclass(frozen=True)
class Published:
    """One layout.

    Attributes:
        format: registered name.
        settings: what the tensors do not tell at tiny sizes.
        run: model -> its outputs by name, for a fixed batch.
        towers: name -> modality, blocks and prunable matrices that its anatomy must have.
        idle: prefixes of parameters of which `run` makes no use.
        file: tensors -> what is in the file.
    """

    format: str
    run: Callable[[nn.Module], dict[str, Tensor]]
    towers: dict[str, tuple[str, int, int]]
    settings: dict[str, Any] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    file: Callable[[dict[str, Tensor]], Any] = lambda state: {"model": state}


def tensors(name: str) -> dict[str, Tensor]:
    """Random tensors of a layout, the same at every call."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return {key: _draw(key, shape, generator) for key, shape in SHAPES[name].items()}


def build(
    name: str, state: dict[str, Tensor] | None = None, extras: dict[str, Any] | None = None, **settings: Any
) -> tuple[Any, LoadReport]:
    """The model of a layout, or of other tensors in it, and what came of them."""
    state = tensors(name) if state is None else state
    return build_official(state, extras or {}, f"{name}.pth", **(PUBLISHED[name].settings | settings))


def _draw(key: str, shape: list[Any], generator: torch.Generator) -> Tensor:
    if shape and shape[-1] == "int":
        size = shape[:-1]
        return torch.arange(size[-1])[None] if "position_ids" in key else torch.zeros(size, dtype=torch.long)
    value = torch.randn(shape, generator=generator)
    if "running_var" in key:
        return 0.5 + value.abs()
    if not shape:
        return torch.tensor(0.1)
    if len(shape) == 1:
        return 0.1 * value + (1.0 if key.endswith("weight") else 0.0)
    return value / max(value[0].numel(), 1) ** 0.5


def ids(vocabulary: int = 60) -> tuple[Tensor, Tensor]:
    """Token ids (2, 7), the second text three tokens shorter and padded with 0, and the mask."""
    drawn = torch.randint(2, vocabulary, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return drawn * mask, mask


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _vse(model: Any) -> dict[str, Tensor]:
    text, mask = ids()
    if model.config.cnn is None:
        valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        return {"similar": model(pixels(2, 5, 20), text, mask, valid)}
    return {"similar": model(pixels(2, 3, 96, 64), text, mask)}


def _vse_file(state: dict[str, Tensor]) -> Any:
    parts = [{f"module.{k[2:]}": v for k, v in state.items() if k.startswith(f"{i}.")} for i in (0, 1)]
    return {"epoch": 25, "model": parts, "best_rsum": 500.0, "opt": argparse.Namespace(no_imgnorm=False), "Eiters": 9}


def _clip4clip(model: Any) -> dict[str, Tensor]:
    text, mask = ids()
    frames = torch.tensor([[1, 1, 1], [1, 1, 0]])
    return {"similar": model(text, pixels(2, 3, 3, 32, 32), frames, mask)}


def _half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's matrices in half precision, as its authors' `convert_weights` makes them."""
    whole = ("ln_", "embedding", "logit_scale")
    return {k: v.half() if k.startswith("clip.") and not any(w in k for w in whole) else v for k, v in state.items()}


def _xvlm(model: Any) -> dict[str, Tensor]:
    text, mask = ids()
    side = model.config.vision_config.image_size
    more = {}
    if model.config.task == "nlvr2":
        more = {"second_image": pixels(2, 3, side, side).flip(0)}
    if model.config.task == "vqa":
        more = {"answer_ids": ids()[0].flip(0), "answer_mask": ids()[1].flip(0)}
    return model(pixels(2, 3, side, side), text, mask, **more)


def _mdetr(model: Any) -> dict[str, Tensor]:
    text, mask = ids()
    text = text.masked_fill(mask == 0, 1)  # RoBERTa's padding
    seen = torch.ones(2, 64, 96)
    seen[1, 33:] = 0
    return model(pixels(2, 3, 64, 96) * seen[:, None], text, mask, seen)


def _mdetr_file(state: dict[str, Tensor]) -> Any:
    average = {k: v * 1.01 if v.is_floating_point() else v for k, v in state.items()}
    return {"model": state, "model_ema": average, "epoch": 39, "args": argparse.Namespace(backbone="resnet101")}


_POOLER = "txt_enc.bert.pooler"
_ROBERTA_POOLER = "transformer.text_encoder.pooler"
_VSE = {"run": _vse, "file": _vse_file, "settings": {"text_heads": 4}}
_CLIP = {"run": _clip4clip, "file": _half, "settings": {"vision_heads": 4, "text_heads": 3, "cross_heads": 4}}
_TWO = {"vision": ("vision", 2, 12), "text": ("text", 3, 18)}
_VSE_TEXT = {"text": ("text", 2, 12)}

_BERT = {"text": ("text", 2, 12), "fusion": ("fusion", 2, 20)}
_XVLM = {"run": _xvlm, "settings": {"text_heads": 4, "vision_heads": 4, "local_layers": 1}}

PUBLISHED: dict[str, Published] = {
    "vse_grid": Published("vse", towers={"vision": ("vision", 5, 0), **_VSE_TEXT}, idle=(_POOLER,), **_VSE),
    "vse_caffe": Published("vse", towers={"vision": ("vision", 5, 0), **_VSE_TEXT}, idle=(_POOLER,), **_VSE),
    "vse_region": Published("vse", towers=_VSE_TEXT, idle=(_POOLER, "img_enc.mlp.bns.1"), **_VSE),
    "clip4clip_meanP": Published("clip4clip", towers=_TWO, **_CLIP),
    "clip4clip_seqLSTM": Published("clip4clip", towers=_TWO, idle=("frame_position_embeddings",), **_CLIP),
    "clip4clip_seqTransf": Published("clip4clip", towers={**_TWO, "frames": ("vision", 2, 12)}, **_CLIP),
    "clip4clip_tightTransf": Published(
        "clip4clip", towers={**_TWO, "cross": ("fusion", 2, 12)}, idle=("clip.logit_scale",), **_CLIP
    ),
    "clip4clip_meanP_3d": Published("clip4clip", towers=_TWO, **_CLIP),
    # Besides the blocks' six matrices, Swin's two patch merges are prunable.
    "xvlm_swin": Published("xvlm", towers={"vision": ("vision", 6, 38), **_BERT}, **_XVLM),
    "xvlm_clip": Published("xvlm", towers={"vision": ("vision", 3, 18), **_BERT}, **_XVLM),
    "mdetr": Published(
        "mdetr", run=_mdetr, file=_mdetr_file, settings={"heads": 4, "text_heads": 2}, idle=(_ROBERTA_POOLER,),
        towers={"vision": ("vision", 5, 0), "text": ("text", 2, 12), "encoder": ("fusion", 2, 8),
                "decoder": ("fusion", 2, 12)},
    ),
}  # fmt: skip
