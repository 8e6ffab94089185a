"""Decoding image cells of a table, with errors that name the image."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trimtab.data.draws import PLACE, described
from trimtab.data.shards import opened
from trimtab.data.streams import Streamed

log = logging.getLogger(__name__)


class ImageError(ValueError):
    """An image that cannot be decoded; the message names it and says how to go on without it."""


def decode(cell: Any, where: str = "image", side: int | None = None) -> Any:
    """A PIL image from what a table holds or a person gives: an image, a dict with `bytes` or `path`, or a path.

    Args:
        cell: see above.
        where: names a picture without a path in messages.
        side: decode a JPEG at a half, a quarter or an eighth of its size (PIL's draft mode) where that leaves both
            sides at least so long; None decodes it whole.

    Raises:
        ImageError: if it cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(cell, Image.Image):
        return cell
    cell = {"path": str(cell)} if isinstance(cell, (str, Path)) else cell or {}
    name = cell.get("path") or where
    try:
        image = Image.open(io.BytesIO(cell["bytes"]) if cell.get("bytes") else opened(cell.get("path")))
        if side is not None:
            image.draft(None, (side, side))  # type: ignore[arg-type]  # a mode of None is the picture's own
        image.load()
        return image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError, AttributeError,
            Image.DecompressionBombError) as error:  # fmt: skip
        raise ImageError(
            f"{name}: cannot be decoded as an image ({error}); mend it, or leave it out with data.drop_bad_images=true "
            "(readers of published sets: data.on_error=skip)"
        ) from error


def decode_rows(rows: Iterable[dict[str, Any]], side: int | None = None) -> list[dict[str, Any]]:
    """The rows with what stands in `image`, and all that stand in `images`, decoded (see `decode`); ImageError at the
    first that cannot be."""
    out = []
    for i, row in enumerate(rows):
        row = dict(row)
        if "image" in row and (row["image"] is not None or row.get("images") is None):
            where = f"the image of {described(row)}" if PLACE in row else f"image {i} of the batch"
            row["image"] = decode(row["image"], where, side)
        if row.get("images") is not None:
            where = described(row) if PLACE in row else f"row {i} of the batch"
            row["images"] = [decode(c, f"picture {k} of {where}", side) for k, c in enumerate(row["images"])]
        out.append(row)
    return out


def encoded(table: Any) -> Any:
    """The table with pictures of its columns `image` and `images` as bytes and path, not decoded on access."""
    from datasets import Dataset, Image, List

    if isinstance(table, Streamed):
        return table  # it decodes none
    if "image" in table.column_names:
        table = table.cast_column("image", Image(decode=False))
    found = table.features.get("images")
    if not isinstance(getattr(found, "feature", None), Image) or not found.feature.decode:
        return table
    # `cast_column` would write every picture of a list anew; stored, they are the same.
    info = table.info.copy()
    info.features = info.features.copy()
    info.features["images"] = List(Image(decode=False))
    return Dataset(table.data, info, table.split, table._indices)


def readable(table: Any, where: str = "table") -> Any:
    """The rows whose pictures can be decoded, a warning for each other one; ImageError if none is left.

    Videos are not looked at: that would take as long as reading them.
    """
    columns = [c for c in ("image", "images") if c in table.column_names]
    if not columns:
        return table
    kept = []
    for i, row in enumerate(encoded(table).select_columns(columns)):
        try:
            for column in columns:
                for cell in row[column] if column == "images" else [row[column]]:
                    decode(cell, f"row {i} of {where}")
            kept.append(i)
        except ImageError as error:
            log.warning("left out: %s", error)
    if not kept:
        raise ImageError(f"{where}: none of its {len(table)} images can be decoded")
    return table if len(kept) == len(table) else table.select(kept)


def blanked(row: dict[str, Any]) -> dict[str, Any]:
    """The row with small black pictures in place of its own, for what reads words only."""
    from PIL import Image

    blank = Image.new("RGB", (8, 8))
    row = {**row, "image": blank} if "image" in row else dict(row)
    return {**row, "images": [blank] * len(row["images"])} if "images" in row else row


def shown(row: dict[str, Any]) -> Any:
    """One RGB picture that stands for a row: its image, its images side by side, or its video's middle frame; None if
    it has no picture.

    Raises:
        ImageError, VideoError: if what it has cannot be decoded.
    """
    if "image" in row:
        return decode(row["image"]).convert("RGB")
    if row.get("images"):
        return beside([decode(cell, f"picture {k}") for k, cell in enumerate(row["images"])])
    if "video" in row:
        from trimtab.data.video import read

        return read(row["video"], lambda length: [length.frames // 2])[0]
    return None


def beside(pictures: Sequence[Any], gap: int = 4) -> Any:
    """Pictures in a row from left to right, all as high as the highest, on white ground."""
    from PIL import Image

    high = max(p.height for p in pictures)
    fitted = [p.convert("RGB").resize((max(1, round(p.width * high / p.height)), high)) for p in pictures]
    ground = Image.new("RGB", (sum(p.width for p in fitted) + gap * (len(fitted) - 1), high), "white")
    left = 0
    for picture in fitted:
        ground.paste(picture, (left, 0))
        left += picture.width + gap
    return ground
