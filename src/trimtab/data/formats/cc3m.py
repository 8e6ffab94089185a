"""Pictures from the web with their alternative texts: CC3M (Sharma et al. 2018), SBU (Ordonez et al. 2011), and any
WebDataset shards of pictures and captions. They calibrate pruners, and pretrain."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trimtab.data import shards
from trimtab.data.base import CAPTIONED, SOURCES
from trimtab.data.held_out import HeldOut
from trimtab.data.reading import DataError, Entry, Kept, Pictures, RowError, find_file, json_rows, read_json, text_lines
from trimtab.files import cache_dir, replace_file

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = 2  # of what is kept of shards


def tsv(path: Path, kept: Kept) -> Iterator[tuple[str, str]]:
    """(caption, address) of each line of CC3M's published file: no header, no quoting, blanks kept.

    Raises:
        DataError: if the file cannot be read, or a line is not a caption, a tab and an address.
    """
    for number, line in text_lines(path):
        row = None
        with kept.row():
            cells = line.split("\t")
            if len(cells) != 2 or not cells[0].strip() or not cells[1].strip():
                raise RowError(f"{path}, line {number}: expected a caption, a tab and an address, found {line[:80]!r}")
            row = cells[0], cells[1]
        if row is not None:
            yield row


def vilt(path: Path, kept: Kept) -> Iterator[tuple[Entry, str, list[str]]]:
    """(path of the picture, its captions) of ViLT's `*_annot.json`, a list of [path, caption], by picture.

    Raises:
        DataError: if the file or a row of it cannot be read.
    """
    pairs = read_json(path)
    if not isinstance(pairs, list):
        raise DataError(f"{path}: expected a JSON list of [path, caption], found a {type(pairs).__name__}")
    found: dict[str, tuple[Entry, list[str]]] = {}
    for i, pair in enumerate(pairs):
        entry = Entry({}, path, f"row [{i}]")
        with kept.row():
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(v, str) and v.strip() for v in pair):
                raise entry.error(f"expected [path, caption], found {str(pair)[:80]}")
            found.setdefault(pair[0], (entry, []))[1].append(pair[1])
    for name, (entry, captions) in found.items():
        yield entry, name, captions


def multiflow(path: Path, kept: Kept) -> Iterator[tuple[Entry, str, str, str]]:
    """(path of the picture, caption, data set) of each row of MULTIFLOW's list.

    Raises:
        DataError: if the file or a row of it cannot be read.
    """
    for entry in json_rows(path):
        row = None
        with kept.row():
            row = entry, entry.text("image"), entry.text("caption"), entry.text("dataset")
        if row is not None:
            yield row


@dataclass(frozen=True, kw_only=True)
class _Streamed(HeldOut):
    rows: int | None = 10_000
    """At most so many rows, the first ones: reading stops there. None for all, which are kept in memory."""

    stream: bool = False
    """Leave the pictures in their shards and read each when it is needed: a set may then be larger than memory, and
    `rows: null` takes all. Where they lie is looked up once, and kept in the cache folder."""

    tasks = CAPTIONED
    splits = ("train",)

    def table(self, task: str, *names: str) -> Dataset:
        """As `Published.table`; with `stream` a table on disk, which says where in the shards each picture lies.

        Raises:
            DataError: also if `stream` is asked for and the set does not lie in shards.
        """
        if not self.stream:
            return super().table(task, *names)
        import pyarrow.ipc
        from datasets import Dataset, Image

        if getattr(self, "form", "webdataset") != "webdataset":
            raise DataError(f"{self}: `stream: true` is for shards (`form: webdataset`); pictures that are files are "
                            "read one by one anyway: leave it out")  # fmt: skip
        found = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in self._shards()]
        key = hashlib.sha256(repr((VERSION, found, self.rows, self.on_error)).encode()).hexdigest()[:16]
        file = cache_dir() / "shards" / f"{key}.arrow"
        if not file.is_file():
            made = super().table(task, *names).cast_column("image", Image(decode=False))  # not by `datasets`
            rows = made.data.table.replace_schema_metadata(made.features.arrow_schema.metadata)
            with replace_file(file) as partial, pyarrow.ipc.new_stream(str(partial), rows.schema) as stream:
                stream.write_table(rows)
        return Dataset.from_file(str(file))  # mapped into memory, not read

    def _shards(self) -> list[Path]:
        return shards.shards(self.files)

    def _full(self, kept: Kept) -> bool:
        return self.rows is not None and len(kept) >= self.rows

    def _read_shards(self, kept: Kept) -> None:
        files = self._shards()
        places = {path: number for number, path in enumerate(files)}  # keys may begin anew in each shard
        for entry in shards.samples(files, self.stream):
            with kept.row():
                image = shards.picture(entry)
                if kept.on_error == "skip":
                    _check(entry, image)
                number = places[entry.file]
                kept.add(image=image, captions=[shards.caption(entry)], image_id=f"{number}/{entry.text('__key__')}")
            if self._full(kept):
                return


def _check(entry: Entry, image: dict[str, Any]) -> None:
    from trimtab.data.images import ImageError, decode

    try:
        decode(image)
    except ImageError as error:
        raise entry.error(f"the picture {error}") from error


@SOURCES.register("webdataset")
@dataclass(frozen=True, kw_only=True)
class WebDataset(_Streamed):
    """Any WebDataset shards whose samples have a picture (jpg, png, ...) and a caption (txt, or in the json)."""

    marks: ClassVar[dict[str, tuple[str, ...]]] = {"": ("*.tar",)}

    shards: str = "**/*.tar"
    """Which files below the root, in the order of their names."""

    def read(self, task: str, name: str, kept: Kept) -> None:
        self._read_shards(kept)

    def _shards(self) -> list[Path]:
        return shards.shards(self.files, self.shards)


@dataclass(frozen=True, kw_only=True)
class _FromTheWeb(_Streamed):
    form: Literal["webdataset", "vilt", "multiflow"] = "webdataset"
    """How it lies there: shards as img2dataset writes them, ViLT's `train_annot.json`, or MULTIFLOW's list. The
    published tsv holds captions and addresses, no pictures."""

    @property
    def _set(self) -> str:
        return str(getattr(type(self), "name", ""))

    def read(self, task: str, name: str, kept: Kept) -> None:
        if self.form == "webdataset":
            return self._read_shards(kept)
        if self.form == "vilt":
            path = find_file(self.files, "train_annot.json", "annot.json")
            find = Pictures(path.parent, decode=self.on_error == "skip")
            rows = ((e, p, c) for e, p, c in vilt(path, kept))
        else:
            path = find_file(self.files, f"{self._set}_pretrain.json", f"{self._set}.json")
            find = self.find_pictures(f"images/{self._set}", self._set, "images")
            if self.pictures is None:  # its lists lie in data/pretrain, and its pictures in images beside data
                find.folders += [p / "images" / self._set for p in path.parents[2:3]]
            rows = ((e, p, [c]) for e, p, c, _ in multiflow(path, kept))
        for entry, picture, captions in rows:
            with kept.row():
                kept.add(image=find(entry, picture), captions=captions, image_id=Path(picture).stem)
            if self._full(kept):
                return


@SOURCES.register("cc3m")
@dataclass(frozen=True, kw_only=True)
class CC3M(_FromTheWeb):
    """Conceptual Captions: 3.3 million pictures from the web with cleaned alternative texts."""

    marks: ClassVar[dict[str, tuple[str, ...]]] = {"vilt": ("train_annot.json",), "multiflow": ("cc3m_*.json",)}


@SOURCES.register("sbu")
@dataclass(frozen=True, kw_only=True)
class SBU(_FromTheWeb):
    """SBU captions: a million pictures of Flickr with what their owners wrote."""

    marks: ClassVar[dict[str, tuple[str, ...]]] = {"vilt": ("annot.json",), "multiflow": ("sbu_*.json",)}
