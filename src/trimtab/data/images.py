"""Decoding image cells of a table, with errors that name the image."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from typing import Any

log = logging.getLogger(__name__)


class ImageError(ValueError):
    """An image that cannot be decoded; the message names it and says how to go on without it."""


def decode(cell: Any, where: str = "image") -> Any:
    """A PIL image from what a table holds: an image, or a dict with `bytes` or `path`.

    Raises:
        ImageError: if it cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(cell, Image.Image):
        return cell
    cell = cell or {}
    name = cell.get("path") or where
    try:
        image = Image.open(io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell.get("path"))
        image.load()
        return image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError, AttributeError,
            Image.DecompressionBombError) as error:  # fmt: skip
        raise ImageError(
            f"{name}: cannot be decoded as an image ({error}); mend it, or leave it out with data.drop_bad_images=true "
            "(readers of published sets: data.on_error=skip)"
        ) from error


def decode_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their `image` decoded; ImageError at the first that cannot be."""
    return [{**row, "image": decode(row["image"], f"image {i} of the batch")} for i, row in enumerate(rows)]


def encoded(table: Any) -> Any:
    """The table with its `image` column as bytes and path instead of pictures decoded on access."""
    from datasets import Image

    return table.cast_column("image", Image(decode=False))


def readable(table: Any, where: str = "table") -> Any:
    """The rows whose image can be decoded, a warning for each other one; ImageError if none is left."""
    cells = encoded(table)["image"]
    kept = []
    for i, cell in enumerate(cells):
        try:
            decode(cell, f"row {i} of {where}")
            kept.append(i)
        except ImageError as error:
            log.warning("left out: %s", error)
    if not kept:
        raise ImageError(f"{where}: none of its {len(table)} images can be decoded")
    return table if len(kept) == len(table) else table.select(kept)
