"""Pictures of samples with their boxes, as data URIs for the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

TARGET_COLOUR = "#00B37D"
PREDICTION_COLOUR = "#FF8C00"
PICTURE_SIDE, THUMBNAIL_SIDE = 160, 74


def sample_picture(folder: Path, sample: dict[str, Any]) -> str | None:
    """Draw a sample's picture, enlarged, with its boxes.

    Args:
        folder: Where the pictures of the run lie.
        sample: An entry of ``samples.json``.

    Returns:
        A data URI, or None if the sample has no readable picture.
    """
    image = _open(folder, sample.get("image"))
    if image is None:
        return None
    picture = _resize(image, PICTURE_SIDE)
    scale = picture.width / image.width
    draw = ImageDraw.Draw(picture)
    # The prediction comes last and thinner, so that a perfect one still leaves its target visible.
    for key, colour, width in (("box_target", TARGET_COLOUR, 4), ("box_predicted", PREDICTION_COLOUR, 2)):
        if (box := _box(sample.get(key), scale)) is not None:
            draw.rectangle(box, outline=colour, width=width)
    return _picture_uri(picture)


def thumbnails(folder: Path, names: Sequence[Any], limit: int = 4) -> list[str]:
    """Return data URIs of small versions of the first few pictures, leaving out any that cannot be read."""
    images = [_open(folder, name) for name in names[:limit]]
    return [_picture_uri(_resize(image, THUMBNAIL_SIDE)) for image in images if image is not None]


def data_uri(png: bytes) -> str:
    """Return a PNG file's content as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _open(folder: Path, name: Any) -> Image.Image | None:
    """Read a picture on white ground; only files in the folder itself are looked at."""
    try:
        with Image.open(folder / Path(str(name)).name) as image:
            layered = image.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    ground = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(ground, layered).convert("RGB")


def _resize(image: Image.Image, side: int) -> Image.Image:
    """Bring the longer side to ``side`` pixels, keeping the pixels visible when enlarging."""
    scale = side / max(image.size)
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return image.resize([max(1, round(length * scale)) for length in image.size], method)


def _box(corners: Any, scale: float) -> list[float] | None:
    if not isinstance(corners, list) or [type(corner) in (int, float) for corner in corners] != [True] * 4:
        return None
    x0, y0, x1, y1 = (corner * scale for corner in corners)
    return [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]


def _picture_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue())
