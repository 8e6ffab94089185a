"""Random changes of training pictures that leave most of what is asked about them as it is.

No mirroring, after which "left of" is wrong, and no change of hue, after which "red" is; but what papers train with
(`randaugment.py`) does change colours, and can be asked for. A crop may cut off what is counted, and moves what stands
in a corner: where questions ask for numbers and places, leave it out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.data import draws
from trimtab.data.images import decode_rows
from trimtab.data.randaugment import Dialect, operations, randaugment
from trimtab.settings import within


@dataclass(frozen=True)
class Augmentation:
    """How pictures are changed. Calling it changes the pictures of rows, and `box` with them.

    Attributes:
        crop: smallest share of a picture's area that a random crop leaves, (0, 1], stretched to the old size; 1 for
            none. A crop holds the row's `box` whole.
        light: brightness and contrast are multiplied by numbers from 1 - light to 1 + light, [0, 1); 0 for none.
        randaugment: a dialect of RandAugment, applied last; None for none. Rows with a `box` get only those of its
            operations that leave everything in its place.

    Raises:
        ValueError: if a setting is out of its range.
    """

    crop: float = 1.0
    light: float = 0.0
    randaugment: Dialect | None = None

    def __post_init__(self) -> None:
        within(vars(self), crop="(0, 1]", light="[0, 1)")
        if self.randaugment is not None:
            operations(self.randaugment)

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return self.crop < 1 or self.light > 0 or self.randaugment is not None

    def __call__(self, rows: list[dict[str, Any]], generator: torch.Generator | None = None) -> list[dict[str, Any]]:
        """Rows with decoded, changed pictures, of `images` each by itself; the rows given stay as they are.

        Args:
            rows: see above.
            generator: of what is drawn; None takes one for each row, made of its place (`draws.py`).

        Raises:
            ValueError: for a row of a video.
        """
        if not self:
            return rows
        seen = [any(row.get(name) is not None for name in ("image", "images", "video")) for row in rows]
        shown = iter(decode_rows([row for row, there in zip(rows, seen, strict=True) if there]))
        return [self._row(next(shown), generator or draws.generator(row, "augmentation")) if there else row
                for row, there in zip(rows, seen, strict=True)]  # fmt: skip

    def _row(self, row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        from PIL import ImageEnhance

        if row.get("images") is not None:
            return {**row, "images": [self._row({"image": p}, generator)["image"] for p in row["images"]]}
        if "video" in row:
            raise ValueError("augmentation changes pictures, and the rows hold videos: leave training.augmentation out")
        out = {**row, "image": row["image"].convert("RGB")}
        if self.crop < 1:
            out |= _cropped(out, self.crop, generator)
        if self.light > 0:
            for change in (ImageEnhance.Brightness, ImageEnhance.Contrast):
                factor = _uniform(1 - self.light, 1 + self.light, generator)
                out["image"] = change(out["image"]).enhance(factor)
        if self.randaugment is not None:
            out["image"] = randaugment(out["image"], self.randaugment, generator, still="box" in row)
        return out


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _cropped(row: dict[str, Any], least: float, generator: torch.Generator) -> dict[str, Any]:
    """A random part of the picture, widened until it holds the box, stretched to the old size; the box in it."""
    from PIL import Image

    picture, box = row["image"], row.get("box")
    width, height = picture.size
    area = _uniform(least, 1, generator)
    ratio = math.exp(_uniform(-math.log(4 / 3), math.log(4 / 3), generator))  # of the sides, as shares of the old ones
    wide, high = min(1.0, math.sqrt(area * ratio)) * width, min(1.0, math.sqrt(area / ratio)) * height
    left, top = _uniform(0, width - wide, generator), _uniform(0, height - high, generator)
    right, bottom = left + wide, top + high
    if box is not None:
        left, top = min(left, max(box[0], 0)), min(top, max(box[1], 0))  # boxes may stick out of the picture
        right, bottom = max(right, min(box[2], width)), max(bottom, min(box[3], height))
    part = picture.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    if box is None:
        return {"image": part}
    across, down = width / (right - left), height / (bottom - top)
    moved = [(box[0] - left) * across, (box[1] - top) * down, (box[2] - left) * across, (box[3] - top) * down]
    return {"image": part, "box": moved}
