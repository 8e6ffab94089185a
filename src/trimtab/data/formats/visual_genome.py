"""Visual Genome (Krishna et al. 2017): phrases about regions of pictures. The published `region_descriptions.json`,
X-VLM's region files (json lines) and MULTIFLOW's two lists are read."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from trimtab.data.base import CAPTIONED, GROUNDED, SOURCES
from trimtab.data.boxes import inside, size_of
from trimtab.data.held_out import HeldOut
from trimtab.data.images import decode
from trimtab.data.reading import DataError, Entry, Kept, Pictures, find_file, json_lines, json_rows

FOLDERS = ("VG_100K", "VG_100K_2")


@dataclass(frozen=True)
class Region:
    """A phrase about a part of a picture. The box is in whole pixels, corners, as the file has it: it may have no area
    or reach beyond the picture."""

    phrase: str
    box: list[int]
    attributes: list[str] | None = None


@dataclass(frozen=True)
class Pictured:
    """A picture of X-VLM's or MULTIFLOW's lists.

    Attributes:
        picture: its path, empty if its bytes stand in the file.
        captions: of the picture as a whole, None if there are none.
    """

    picture: str
    content: bytes | None
    captions: list[str] | None
    regions: list[Region]


def _pixels(entry: Entry, values: Any) -> list[int]:
    values = values if isinstance(values, list) else [values]
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]
    if len(numbers) != 4 or len(values) != 4:
        raise entry.error(f"expected a box of four numbers (x, y, width, height), found {values}")
    x, y, width, height = map(int, numbers)  # cut, as X-VLM does
    return [x, y, x + width, y + height]


def published(path: Path, kept: Kept) -> Iterator[tuple[Entry, int, Region]]:
    """(number of the picture, region) in the order of `region_descriptions.json`.

    Raises:
        DataError: if the file or a row of it cannot be read.
    """
    for picture in json_rows(path):
        found: list[Entry] = []
        with kept.row():
            found = picture.inner("regions")
        for entry in found:
            row = None
            with kept.row():
                box = _pixels(entry, [entry.get(k) for k in ("x", "y", "width", "height")])
                row = entry, entry.number("image_id"), Region(entry.text("phrase"), box)
            if row is not None:
                yield row


def regions(path: Path, kept: Kept, lines: bool) -> Iterator[tuple[Entry, Pictured]]:
    """The pictures of a region file: json lines as X-VLM's, or one list as MULTIFLOW's.

    Raises:
        DataError: if the file or a row of it cannot be read.
    """
    for entry in json_lines(path) if lines else json_rows(path):
        found = None
        with kept.row():
            parts = [
                Region(phrase, _pixels(e, e.get("bb", list)), e.texts("attributes") if "attributes" in e else None)
                for e in entry.inner("elems")
                for phrase in _captions(e)  # a list of phrases means the same box
            ]
            captions = _captions(entry) if "caption" in entry else None
            content = _binary(entry)
            name = entry.text("image") if content is None or "image" in entry else ""
            found = entry, Pictured(name, content, captions, parts)
        if found is not None:
            yield found


def _captions(entry: Entry) -> list[str]:
    """The field `caption`, a string or a list of them."""
    return [entry.text("caption")] if isinstance(entry.get("caption"), str) else entry.texts("caption")


def _binary(entry: Entry) -> bytes | None:
    if "binary" not in entry:
        return None
    try:
        return base64.b64decode(entry.text("binary"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise entry.error(f"expected 'binary' to be a picture in base64 ({error})") from error


def pretraining(path: Path, kept: Kept) -> Iterator[tuple[Entry, Pictured]]:
    """The pictures of MULTIFLOW's pretraining list, with parallel lists `caption` and `bb`.

    Raises:
        DataError: if the file or a row of it cannot be read.
    """
    for entry in json_rows(path):
        found = None
        with kept.row():
            phrases, boxes = entry.texts("caption"), entry.get("bb", list)
            if len(phrases) != len(boxes):
                raise entry.error(f"expected a box for each of {len(phrases)} captions, found {len(boxes)}")
            parts = [Region(p, _pixels(entry, b)) for p, b in zip(phrases, boxes, strict=True)]
            found = entry, Pictured(entry.text("image"), None, None, parts)
        if found is not None:
            yield found


def valid(entry: Entry, region: Region, size: tuple[int, int]) -> list[int]:
    """The region's box, by X-VLM's rule.

    Raises:
        RowError: if it has no area or does not lie in the picture as a whole.
    """
    if not inside([float(v) for v in region.box], size):
        raise entry.error(f"expected a box with an area in its picture of {size[0]} x {size[1]} pixels, found corners "
                          f"{region.box} for {region.phrase!r}")  # fmt: skip
    return region.box


@SOURCES.register("visual-genome")
@dataclass(frozen=True, kw_only=True)
class VisualGenome(HeldOut):
    """Visual Genome's regions: for grounding a phrase and its box, for other tasks a picture with its phrases."""

    form: Literal["official", "xvlm", "multiflow", "multiflow-pretraining"] = "official"
    """Whose files. The last cuts each region out, and its phrase is the caption."""
    file: str | None = None
    """Path below the root of the file, or of the folder of part files; None takes the usual name."""
    attributes: bool = False
    """Put a region's first attribute before its phrase; X-VLM draws one anew each time."""
    rows: int | None = 10_000
    """At most so many rows, the first ones: reading stops there. None for all."""

    tasks = (*GROUNDED, *CAPTIONED)
    splits = ("train",)
    marks: ClassVar[dict[str, tuple[str, ...]]] = {
        "official": ("region_descriptions.json",),
        "xvlm": ("part-0*",),
        "multiflow": ("vg_regions.json",),
        "multiflow-pretraining": ("vg_pretrain.json",),
    }

    def _find(self) -> Pictures:
        root = Path(self.root)
        tops = [Path(self.pictures)] if self.pictures else [root, root / "images", root / "image"]
        below = [t / f for t in tops for f in FOLDERS]
        return Pictures(*tops, *below, decode=self.on_error == "skip")

    def _files(self) -> list[Path]:
        usual = {"official": "region_descriptions.json", "multiflow": "vg_regions.json",
                 "multiflow-pretraining": "vg_pretrain.json"}  # fmt: skip
        if self.file is None and self.form in usual:
            return [find_file(self.files, usual[self.form])]
        path = Path(self.files) / self.file if self.file else None
        if path is not None and not path.is_dir():
            return [path]
        found = sorted(p for p in (path or self.files).glob("part-*" if path else "**/part-*") if p.is_file())
        if not found:
            raise DataError(f"{path or self.files}: expected part files (part-00000, ...), found none")
        return found

    def read(self, task: str, name: str, kept: Kept) -> None:
        find = self._find()
        for path in self._files():
            for entry, image, captions, parts in self._pictured(path, find, kept):
                # In X-VLM's lists one bad region leaves out its picture, in the published file only itself.
                alone = self.form == "official" and task in GROUNDED
                for group in [[p] for p in parts] if alone else [parts]:
                    with kept.row():
                        for row in self._rows(task, entry, image, captions, group):
                            kept.add(**row)
                if self.rows is not None and len(kept) >= self.rows:
                    return

    def _pictured(self, path: Path, find: Pictures, kept: Kept) -> Iterator[tuple[Entry, Any, Any, list[Region]]]:
        if self.form == "official":
            yield from self._by_picture(path, find, kept)
            return
        pretrain = self.form == "multiflow-pretraining"
        for entry, p in pretraining(path, kept) if pretrain else regions(path, kept, self.form == "xvlm"):
            with kept.row():
                image = find(entry, p.picture) if p.content is None else {"path": None, "bytes": p.content}
                yield entry, image, p.captions, p.regions

    def _by_picture(self, path: Path, find: Pictures, kept: Kept) -> Iterator[tuple[Entry, Any, Any, list[Region]]]:
        found: dict[int, tuple[Entry, list[Region]]] = {}
        for entry, number, region in published(path, kept):
            found.setdefault(number, (entry, []))[1].append(region)
        for number, (entry, parts) in found.items():
            with kept.row():
                yield entry, find(entry, f"{number}.jpg"), [p.phrase for p in parts], parts

    def _rows(self, task: str, entry: Entry, image: Any, captions: list[str] | None, parts: list[Region]
              ) -> list[dict[str, Any]]:  # fmt: skip
        """The rows of a picture for a task."""
        cut = self.form == "multiflow-pretraining" and task not in GROUNDED
        if task not in GROUNDED and not cut:
            if not captions:
                raise entry.error("has no caption of the picture as a whole; it serves the task 'grounding'")
            return [{"image": image, "captions": captions}]
        size = size_of(entry, image)
        boxes = [valid(entry, p, size) for p in parts]
        if cut:
            picture = decode(image).convert("RGB")
            return [{"image": picture.crop((b[0], b[1], b[2], b[3])), "captions": [p.phrase]}
                    for p, b in zip(parts, boxes, strict=True)]  # fmt: skip
        return [{"image": image, "phrase": self._phrase(p), "box": b} for p, b in zip(parts, boxes, strict=True)]

    def _phrase(self, region: Region) -> str:
        return f"{region.attributes[0]} {region.phrase}" if self.attributes and region.attributes else region.phrase
