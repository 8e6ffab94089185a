"""Boxes as data sets write them (x, y, width, height), read as corners in pixels."""

from __future__ import annotations

import io
import math
from typing import Any

from trimtab.data.reading import Entry

Box = list[float]


def corners(entry: Entry, name: str, size: tuple[int, int] | None = None) -> Box:
    """The field `name`, [x, y, width, height], as [left, top, right, bottom]; it may stick out of the picture.

    Args:
        size: width and height of the picture, where they are known.

    Raises:
        RowError: if it is no box, has no area, or none of it lies in the picture.
    """
    values = entry.get(name, list)
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]
    if len(values) != 4 or len(numbers) != 4:
        raise entry.error(f"expected {name!r} to be a box of four numbers (x, y, width, height), found {values}")
    x, y, width, height = numbers
    if width <= 0 or height <= 0:
        raise entry.error(f"expected {name!r} to be a box with an area, found {values} (x, y, width, height)")
    box = [x, y, x + width, y + height]
    if size is not None:
        left, top, right, bottom = clamped(box, size)
        if right <= left or bottom <= top:
            raise entry.error(f"expected {name!r} to be a box in its picture of {size[0]} x {size[1]} pixels, "
                              f"found {values} (x, y, width, height), which lies outside")  # fmt: skip
    return box


def clamped(box: Box, size: tuple[int, int]) -> Box:
    """Corners moved into a picture of (width, height)."""
    limits = (size[0], size[1], size[0], size[1])
    return [min(max(value, 0), limit) for value, limit in zip(box, limits, strict=True)]


def inside(box: Box, size: tuple[int, int]) -> bool:
    """Whether a box with an area lies in the picture as a whole, which X-VLM demands."""
    left, top, right, bottom = box
    return left >= 0 and top >= 0 and left < right <= size[0] and top < bottom <= size[1]


def size_of(entry: Entry, cell: dict[str, Any]) -> tuple[int, int]:
    """Width and height of a picture, from the head of its file.

    Raises:
        RowError: if the file is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]) as picture:
            return picture.size
    except (UnidentifiedImageError, OSError) as error:
        raise entry.error(f"its picture cannot be decoded ({error})") from error
