"""Pictures as the image processor in a transformers folder prepares them, by transformers' own code.

    preprocessor_config.json, or the image processor in processor_config.json --read_pictures--> Processed

transformers 5 has every processor for PIL and numpy alone, so that torchvision is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.backbones.pictures import (
    RULE,
    Bounded,
    Cropped,
    Pictures,
    Placement,
    Stretched,
    plain,
    together,
)

RULES: dict[str, type[Pictures]] = {kind.__name__: kind for kind in (Pictures, Cropped, Bounded, Stretched)}


@dataclass(frozen=True)
class Processed(Pictures):
    """What a processor of transformers makes of pictures. `size`, `mean` and `std` are read from it; `size` is the side
    that a square picture gets.

    Attributes:
        settings: the processor's configuration as JSON, by which two are compared.
        processor: itself.
    """

    settings: str = ""
    processor: Any = field(default=None, repr=False, compare=False)

    @staticmethod
    def of(processor: Any, where: str = "image processor") -> Processed:
        """Of an image processor of transformers that works without torchvision.

        Raises:
            ValueError: if it gives something else than one (3, H, W) a picture, as those that cut a picture into tiles
                or patches do.
        """
        shape = _shapes(processor, [(8, 8)])
        if shape is None:
            raise ValueError(
                f"{where}: {type(processor).__name__} gives no (3, H, W) for a picture: it cuts pictures into tiles or "
                "patches, which this model's tasks of features do not take"
            )
        mean, std = (tuple(float(x) for x in _three(getattr(processor, n))) for n in ("image_mean", "image_std"))
        settings = json.dumps(processor.to_dict(), sort_keys=True, default=str)
        return Processed(shape[0][0], mean, std, settings, processor)  # type: ignore[arg-type]

    @property
    def fixed(self) -> bool:
        found = _shapes(self.processor, [(8, 8), (16, 8), (8, 16)]) or []
        return len(set(found)) == 1

    @property
    def shape(self) -> tuple[int, int]:
        found = _shapes(self.processor, [(8, 8)])
        assert found is not None  # `of` has seen to it
        return found[0]

    def __call__(self, pictures: Sequence[Any]) -> Tensor:
        # A processor that does not turn pictures into RGB takes grey ones for something else, or fails.
        ready = list(pictures) if self.processor.do_convert_rgb else [plain(p) for p in pictures]
        try:
            found = self.processor(ready)["pixel_values"]
        except ValueError as error:
            sizes = ", ".join(sorted({f"{p.size[0]} x {p.size[1]}" for p in pictures})[:3])
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{type(self.processor).__name__}: cannot prepare pictures such as {sizes} ({reason}); "
                             "`pictures: squash` takes any shape") from error  # fmt: skip
        return together([torch.as_tensor(np.asarray(p), dtype=torch.float32) for p in found])

    def place(self, size: tuple[int, int]) -> Placement:
        """Where a picture comes to stand, found by running the processor's own steps on coordinates.

        Raises:
            ValueError: if the processor has steps of its own, so that this is not known.
        """
        from transformers.image_processing_backends import PilBackend
        from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

        kind = type(self.processor)
        steps = ("resize", "center_crop", "pad", "_preprocess")
        if kind is not ViltImageProcessorPil and any(getattr(kind, s) is not getattr(PilBackend, s) for s in steps):
            raise ValueError(f"{kind.__name__}: where a picture stands in what it gives is not known, so that boxes "
                             "cannot follow: use `pictures: squash`")  # fmt: skip
        return _place(_Key(self.settings, self.processor), size)

    def config(self) -> dict[str, Any]:
        return json.loads(self.settings)


@dataclass(frozen=True)
class _Key:
    """A processor that can be the key of a cache."""

    settings: str
    processor: Any = field(compare=False)


@lru_cache(maxsize=4096)
def _place(key: _Key, size: tuple[int, int]) -> Placement:
    """Resize a picture whose pixels are their own coordinates' places, then see where the coordinates went."""
    processor = key.processor
    resized = size
    if processor.do_resize:
        blank = np.zeros((1, size[1], size[0]), np.uint8)
        high, wide = processor.resize(blank, size=processor.size, resample=0).shape[1:]
        resized = (wide, high)
    rows, columns = np.mgrid[1 : resized[1] + 1, 1 : resized[0] + 1].astype(np.float32)
    # One batch of one picture: padding to the largest of a batch is no part of its frame.
    image = np.stack([columns, rows])
    if getattr(processor, "do_center_crop", None):
        image = processor.center_crop(image, processor.crop_size)
    pad = getattr(processor, "pad_size", None)
    if getattr(processor, "do_pad", None) and pad is not None and pad.height:
        image = processor.pad([image], pad_size=pad)[0]
    there = np.argwhere(image[0] > 0)
    y, x = (int(v) for v in there[0])
    offset = (x + 1 - int(image[0, y, x]), y + 1 - int(image[1, y, x]))
    return Placement(resized, offset, (image.shape[2], image.shape[1]))


def _shapes(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """(H, W) of what a processor gives for pictures of these sizes; None if it is no (3, H, W)."""
    from PIL import Image

    found = []
    for size in sizes:
        out = processor([Image.new("RGB", size)])["pixel_values"]
        shape = np.asarray(out[0]).shape
        if len(out) != 1 or len(shape) != 3 or shape[0] != 3:
            return None
        found.append((int(shape[1]), int(shape[2])))
    return found


def _three(value: Any) -> tuple[float, ...]:
    return (value,) * 3 if isinstance(value, (int, float)) else tuple(value)


def own_pictures(folder: Path) -> Pictures | None:
    """How a folder that trimtab or transformers wrote wants its pictures; None if it does not say so, as one that was
    converted from its authors' file: then they are prepared as the authors do it."""
    return None if _content(folder)[1] is None else read_pictures(folder, 0)


def read_pictures(folder: Path, size: int, published: Pictures | None = None, tiles: bool = False) -> Pictures:
    """How a transformers folder wants its pictures.

    Args:
        folder: of the model; preprocessor_config.json, or processor_config.json with an image processor in it.
        size: side of the squares that the model takes, if the folder does not say how pictures are prepared.
        published: what the model's authors do, if the folder does not say it; None for squares of `size` pixels.
        tiles: squash pictures to squares of `size` pixels with the folder's mean and deviation where its processor cuts
            them into tiles or patches; else such a processor is an error.

    Raises:
        ValueError: if the processor is unknown, or cannot be used; the message names the file.
    """
    file, content = _content(folder)
    if content is None:
        return published or Pictures(size)
    if RULE in content:
        return _rule(content[RULE], file)
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, KeyError, AttributeError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file}: expected an image processor that transformers has for PIL ({reason})") from error
    if tiles and _tiled(processor):
        mean, std = (_three(getattr(processor, n)) for n in ("image_mean", "image_std"))
        return Pictures(size, tuple(mean), tuple(std))  # type: ignore[arg-type]
    return Processed.of(processor, str(file))


def cut_into_tiles(folder: Path, pictures: Pictures) -> dict[str, str]:
    """The processor's files of a folder, by name, if it cuts pictures into tiles and `read_pictures` gave others."""
    _, content = _content(folder)
    if content is None or RULE in content or isinstance(pictures, Processed):
        return {}
    names = ("preprocessor_config.json", "processor_config.json")
    return {n: (folder / n).read_text(encoding="utf-8") for n in names if (folder / n).is_file()}


def _tiled(processor: Any) -> bool:
    try:
        return _shapes(processor, [(8, 8)]) is None
    except (KeyError, ValueError):
        return True


def _content(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """The file that says how pictures are prepared, and what stands in it; None if there is none."""
    own, joint = folder / "preprocessor_config.json", folder / "processor_config.json"
    for file in (joint, own):
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: no JSON ({error})") from error
        content = content.get("image_processor") if file == joint else content
        if content:
            return file, content
    return own, None


def _rule(content: dict[str, Any], file: Path) -> Pictures:
    kind = RULES.get(str(content.get("rule")))
    names = {f.name for f in fields(kind)} if kind else set()
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items() if k != "rule"}
    if kind is None or given.keys() - names or "size" not in given:
        raise ValueError(f"{file}: {RULE}: expected `rule`, one of {', '.join(RULES)}, and its settings, found "
                         f"{content!r}")  # fmt: skip
    settings: dict[str, Any] = given
    return kind(**settings)
