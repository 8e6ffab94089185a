"""A user's own data: single files, a folder of pictures with `metadata.jsonl`, and folders that `datasets` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.data import identity, tables
from trimtab.data.base import SOURCES, Split, read_by
from trimtab.data.reading import DataError, OnError
from trimtab.data.streams import SUFFIXES, Streamed, files

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class _Mapped:
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns, {the task's: the file's}, such as {captions: text}; columns named as the task's need none."""
    pictures: Path | None = None
    """Folder from which the paths of pictures and videos go out; None for the folder of the file."""
    on_error: OnError = "stop"
    """`stop` at the first row that cannot be read, or `skip`: leave it out, count and list what was left out."""
    drop_bad_images: bool = False
    """Leave out images that cannot be decoded instead of stopping."""
    stream: bool = False
    """Read training rows from Parquet or JSON-lines files one after another, as training needs them, for sets larger
    than memory and disk; `training.buffer` of them are held and mixed (1,000 if it is not set)."""
    count: int | None = None
    """How many answers or classes the training rows have: for `trimtab cost`, before the data are there. Training and
    evaluation take them from the rows."""

    def __post_init__(self) -> None:
        if self.stream and (self.drop_bad_images or self.on_error != "stop"):
            raise DataError(f"{self._name}: stream: rows are read when they are needed, so that none can be left out: "
                            "leave out on_error and drop_bad_images")  # fmt: skip
        if self.count is not None and self.count < 1:
            raise ValueError(f"{self._name}: count: expected at least 1, found {self.count}")

    @property
    def needs(self) -> Path:
        """The file or folder without which nothing can be read."""
        return Path(getattr(self, "root", None) or self.train)  # type: ignore[attr-defined]

    def known_count(self, what: str) -> tuple[int | None, str]:
        """How many `answers` or `classes` the settings say there are, and who says so; or None, and what to do."""
        return self.count, "say so with data.count=NUMBER" if self.count is None else "as data.count says"

    def _read(self, path: Path, task: str) -> Dataset:
        typed = read_by(task) or {task}  # a column's own name, where its values alone are asked for
        return tables.read(path, self.columns, self.pictures, self.on_error, not self.drop_bad_images, typed)

    def _streamed(self, paths: Sequence[Path], task: str) -> Streamed:
        if missing := [p for p in paths if not p.exists()]:
            raise FileNotFoundError(f"{missing[0]}: there is no such file or folder")
        found = [p for p in paths if p.is_file()]
        found += [f for p in paths if p.is_dir() for f in sorted(p.iterdir()) if f.suffix in SUFFIXES]
        if not found:
            raise DataError(
                f"{self._name}: {paths[0]}: expected files that end in {', '.join(SUFFIXES)} for `stream: true`, found "
                "none: leave it out (a folder that `datasets` saved is not read into memory anyway)"
            )
        folder = Path(self.pictures) if self.pictures else found[0].parent
        return files(found, self.columns, folder, read_by(task) or {task})

    def _values(self, column: str) -> Sequence[str]:
        table: Any = self.load(column, "train")  # type: ignore[attr-defined]
        if column not in table.column_names:
            raise DataError(f"{self._name}: expected the column {column!r} in the training rows, found "
                            f"{', '.join(table.column_names)}; name it with data.columns")  # fmt: skip
        return tables.names_of(table, column)

    @property
    def _name(self) -> str:
        return f"data {getattr(type(self), 'name', '')!r}"

    def answers(self) -> Sequence[str]:
        """The answers of the training rows, in order of the alphabet."""
        return self._values("answer")

    def classes(self) -> Sequence[str]:
        """The labels of the training rows, in order of the alphabet."""
        return self._values("label")


@SOURCES.register("files")
@dataclass(frozen=True)
class Files(_Mapped):
    """Your own rows: a JSON object a line (or a JSON list, CSV, TSV, Parquet, or a folder of pictures with
    `metadata.jsonl`), with `image` (a path beside the file) and the task's columns. Or rows of a chat, with `messages`.

    `{"image": "cats/1.jpg", "question": "how many cats are there?", "answer": "2"}`
    """

    train: Path
    """File or folder to train on."""
    test: Path
    """File or folder to evaluate on."""
    validation: Path | None = None
    """File or folder from which searches draw their rewards; None takes the training rows."""
    held_out: float = 0.0
    """Share of the training pictures, evenly spread over the file, whose rows are kept for validation and not trained
    on."""
    group: bool = False
    """Join the rows of a picture, a caption each, into one with all its captions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream and self.held_out:
            raise DataError(
                f"{self._name}: held_out: no rows can be held out of a stream: give a file for `validation`"
            )
        if self.stream and self.group:
            raise DataError(f"{self._name}: group: a stream is read row by row: leave out `group`, or `stream`")
        if not 0 <= self.held_out < 1 or (self.held_out and self.validation is not None):
            raise DataError(
                f"{self._name}: held_out: expected a share from 0 to below 1, and none beside `validation`, found "
                f"{self.held_out}"
            )

    def load(self, task: str, split: Split) -> Dataset:
        """All rows of the split's file, without those that are held out of it.

        Raises:
            FileNotFoundError: if the file is not there.
            DataError: if it is of no known kind, a row lacks a picture or has a value of a wrong type, with both, or
                there are too few rows to hold some out.
        """
        path = (self.validation or self.train) if split == "validation" else getattr(self, split)
        if self.stream and (split == "train" or (split == "validation" and self.validation is None)):
            return self._streamed([Path(path)], task)  # type: ignore[return-value]
        table = self._read(Path(path), task)
        if self.group:
            table = identity.grouped(table)
        if split == "test" or not self.held_out:
            return table
        rest, held = identity.spread(table, self.held_out)
        if not rest or not held:
            raise DataError(
                f"{self._name}: {self.train}: the pictures of {len(table)} rows are too few to hold out "
                f"{self.held_out:g} of them: give a file for `validation`, or more rows"
            )
        return table.select(held if split == "validation" else rest)

    def answers(self) -> Sequence[str]:
        """The answers of the training rows, in order of the alphabet.

        Raises:
            DataError: if a row of a text file has none.
        """
        kept = tables.Kept(self.on_error)
        if not self.stream and not tables.ready(Path(self.train)):
            for entry in tables.entries(Path(self.train), kept):
                with kept.row():
                    entry.get(self.columns.get("answer", "answer"))
        return super().answers()


@dataclass(frozen=True, kw_only=True)
class _Folder(_Mapped):
    root: Path
    """Folder with one file or folder a split: train, test, and perhaps validation (or val, dev)."""
    train: Literal["train", "test", "validation"] = "train"
    """Which split to train on."""
    test: Literal["train", "test", "validation"] = "test"
    """Which split to evaluate on; `validation` where the answers of the test split are not published."""
    validation: Literal["train", "test", "validation"] | None = None
    """From which split searches draw their rewards; None takes `validation` if it is there and not what `test` names,
    else the training rows."""

    def load(self, task: str, split: Split) -> Dataset:
        """All rows of a split.

        Raises:
            FileNotFoundError: if the folder is not there.
            DataError: if it has no such split, or a row cannot be read.
        """
        from datasets import concatenate_datasets

        found = tables.splits(self.root)
        own = "validation" in found and self.test != "validation"
        name = getattr(self, split) or ("validation" if own else self.train)
        if name not in found:
            raise DataError(f"{self._name}: {self.root}: expected a file or folder for {name!r}, found "
                            f"{', '.join(found) or 'no split'}; choose with data.{split}, or name files with "
                            "the source 'files'")  # fmt: skip
        if self.stream and name == self.train and split != "test":
            return self._streamed(found[name], task)  # type: ignore[return-value]
        read = [self._read(path, task) for path in found[name]]
        return concatenate_datasets(read) if len(read) > 1 else read[0]


@SOURCES.register("imagefolder")
@dataclass(frozen=True, kw_only=True)
class ImageFolder(_Folder):
    """Pictures with a `metadata.jsonl` (or .csv) in the folder of each split, as Hugging Face's `imagefolder`; or a
    folder of pictures a class."""


@SOURCES.register("datasets")
@dataclass(frozen=True, kw_only=True)
class Datasets(_Folder):
    """A folder that the library `datasets` saved (`save_to_disk`), or Parquet files named by their splits."""
