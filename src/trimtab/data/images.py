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
    name = cell.get("path") or where
    try:
        image = Image.open(io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"])
        image.load()
        return image
    except (UnidentifiedImageError, OSError, SyntaxError, TypeError, AttributeError) as error:
        raise ImageError(
            f"{name}: cannot be decoded as an image ({error}); mend it, or leave it out with data.skip_bad_images=true"
        ) from error


def decode_rows(rows: Iterable[dict[str, Any]], skip: bool = False) -> list[dict[str, Any]]:
    """The rows with their `image` decoded; with `skip`, bad ones are left out with a warning.

    Raises:
        ImageError: at the first bad image, or with `skip` if no row is left.
    """
    kept = []
    error: ImageError | None = None
    for i, row in enumerate(rows):
        try:
            kept.append({**row, "image": decode(row["image"], f"image {i} of the batch")})
        except ImageError as bad:
            if not skip:
                raise
            error = bad
            log.warning("left out: %s", bad)
    if not kept and error:
        raise error
    return kept
