"""Files of a user as tables: JSON, JSON lines, CSV, Parquet, folders that `datasets` saved, and image folders.

Columns that a task knows (`trimtab.data.base.COLUMNS`) get their types, each fault with file and row; other columns
stay as they are. A column map, {task's column: the file's}, gives them their names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.data import chats
from trimtab.data.base import COLUMNS, features
from trimtab.data.boxes import size_of
from trimtab.data.reading import DataError, Entry, Kept, OnError, Pictures, csv_rows, json_lines, json_rows
from trimtab.data.ready import ONCE, check_box, check_captions, check_inside, checked, ready, saved
from trimtab.registry import unknown

if TYPE_CHECKING:
    from datasets import Dataset

METADATA = ("metadata.jsonl", "metadata.csv")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SEEN = ("image", "images", "video", "messages")  # a row needs one of these
IDS = (*ONCE, "image_id", "video_id", "caption_ids", "ref_id", "ann_id")


def read(path: Path, columns: Mapping[str, str] | None = None, pictures: Path | None = None,
         on_error: OnError = "stop", find: bool = True, typed: Collection[str] = COLUMNS) -> Dataset:  # fmt: skip
    """The table of a file or folder.

    Args:
        path: a file with one of `SUFFIXES`, a folder that `datasets` saved, or a folder of pictures with
            `metadata.jsonl`, or with one folder a class.
        columns: a task's column -> the file's.
        pictures: folder from which paths of pictures and videos go out; None for the file's own.
        on_error: `stop`, or `skip`: rows that cannot be read are left out, counted and listed.
        find: look whether the pictures are there.
        typed: columns that must be of a task's type, beside ids and what a row shows; one that the task does not read
            may hold anything under its name, and stays as it is.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        DataError: if it is of no known kind, or a row cannot be read.
    """
    table, kept = _read(Path(path), columns, pictures, on_error, find, typed)
    kept.tell(str(path), len(table))
    return table


def look(path: Path, columns: Mapping[str, str] | None, pictures: Path | None, typed: Collection[str]
         ) -> tuple[Dataset, list[str]]:  # fmt: skip
    """The table of a file or folder as `read` gives it, and a sentence for each row that cannot be read."""
    table, kept = _read(Path(path), columns, pictures, "skip", True, typed, decode=False)
    return table, kept.left_out


def one(entry: Entry, columns: Mapping[str, str], folder: Path, typed: Collection[str]) -> dict[str, Any]:
    """A row by itself as a task's columns, with pictures that are paths or embedded; nobody looks whether they are
    there.

    Raises:
        RowError: as for the rows of a file.
    """
    reader = _Reader(folder, columns, "stop", False, {*SEEN, *IDS, *columns, *typed}, decode=False)
    reader.add(entry)
    return reader.rows[0]


def _read(path: Path, columns: Mapping[str, str] | None, pictures: Path | None, on_error: OnError, find: bool,
          typed: Collection[str], decode: bool = True) -> tuple[Dataset, Kept]:  # fmt: skip
    columns = dict(columns or {})
    typed = {*SEEN, *IDS, *columns, *typed}
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if files := ready(path):
        found = saved(files, columns, Path(pictures) if pictures else path.parent, typed)
        return checked(found, path, typed, on_error, find)
    folder = Path(pictures) if pictures else path if path.is_dir() else path.parent
    reader = _Reader(folder, columns, on_error, find, typed, decode)
    for entry in entries(path, reader.kept):
        with reader.kept.row():
            reader.add(entry)
    return reader.table(path), reader.kept


# --- rows of text files -----------------------------------------------------------------------------------------------


def entries(path: Path, kept: Kept) -> Iterator[Entry]:
    """The rows of a text file, or of a folder of pictures, whose field `file_name` becomes `image`.

    Raises:
        DataError: if it is of no known kind or cannot be read.
    """
    if path.is_dir():
        yield from _folder(path, kept)
    elif path.suffix in (".csv", ".tsv"):
        yield from csv_rows(path, [], "\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".json" and path.read_text(encoding="utf-8-sig", errors="replace").lstrip().startswith("["):
        yield from json_rows(path)
    elif path.suffix in SUFFIXES:
        yield from json_lines(path)
    else:
        raise DataError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}, or a folder of data")


def _folder(path: Path, kept: Kept) -> Iterator[Entry]:
    file = next((path / name for name in METADATA if (path / name).is_file()), None)
    if file is not None:
        for entry in csv_rows(file, []) if file.suffix == ".csv" else json_lines(file):
            named = None
            with kept.row():
                named = Entry(dict(_image_columns(entry)), file, entry.row)
            if named is not None:
                yield named
        return
    found = sorted(p for p in path.glob("*/**/*") if p.suffix.lower() in PICTURES and p.is_file()
                   and not any(_is_junk(part) for part in p.relative_to(path).parts))  # fmt: skip
    if not found:
        raise DataError(f"{path}: expected {' or '.join(METADATA)}, or one folder of pictures a class, found neither")
    for i, picture in enumerate(found):
        below = picture.relative_to(path)
        yield Entry({"image": str(below), "label": below.parts[0]}, path, f"picture [{i}]")


def _is_junk(name: str) -> bool:
    """Whether a folder or file is one that programs leave behind (.ipynb_checkpoints, ._1.jpg, __MACOSX)."""
    return name.startswith(".") or name == "__MACOSX"


def _image_columns(entry: Entry) -> Iterator[tuple[str, Any]]:
    """The row with `file_name` as `image`, `x_file_name` as `x`, and `file_names` as `images`."""
    names = [k for k in entry.values if k in ("file_name", "file_names") or k.endswith(("_file_name", "_file_names"))]
    if not names:
        raise entry.error(f"expected the field 'file_name', found {', '.join(map(repr, entry.values)) or 'none'}")
    for key, value in entry.values.items():
        if key in names:
            key = {"file_name": "image", "file_names": "images"}.get(key) or key.rpartition("_file_name")[0]
        yield key, value


class _Reader:
    """Turns rows into typed columns."""

    def __init__(self, folder: Path, columns: Mapping[str, str], on_error: OnError, find: bool,
                 typed: Collection[str], decode: bool):  # fmt: skip
        for name in columns:
            if name not in COLUMNS and name != "messages":
                raise DataError(f"the column map: {unknown('column', name, [*COLUMNS, 'messages'])}")
        self.kept, self.folder, self.find = Kept(on_error), folder, find
        self.names = {file: name for name, file in columns.items()}
        self.pictures = Pictures(folder, decode=decode and on_error == "skip")
        self.typed = {name for name in typed if name in COLUMNS}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.rows: list[dict[str, Any]] = []

    def add(self, entry: Entry) -> None:
        """Keep a row.

        Raises:
            RowError: if a column that a task knows has no value of its type.
        """
        for file, name in self.names.items():
            if entry.values.get(file) is None:
                there = ", ".join(repr(k) for k, v in entry.values.items() if v is not None)
                raise entry.error(f"expected the field {file!r} (for {name!r}), found {there or 'none'}")
        named = Entry({self.names.get(k, k): v for k, v in entry.values.items()}, entry.file, entry.row)
        if not any(named.values.get(c) is not None for c in SEEN):
            raise entry.error(f"expected the field 'image' (or {', '.join(SEEN[1:])}), found "
                              f"{', '.join(map(repr, entry.values)) or 'none'}: where it has another name, give that "
                              "in `columns`, such as columns.image=file")  # fmt: skip
        row = {k: self._cell(named, k, v) if k in self.typed else v for k, v in named.values.items() if k != "messages"}
        if "messages" in named:
            alone = [row.pop("image")] if row.get("image") is not None else []
            row["messages"], row["images"] = chats.conversation(named, self._picture, row.get("images") or alone)
            row["answer"] = chats.answer(row["messages"])
        if "box" in self.typed and row.get("box") and row.get("image") and self.find:
            check_inside(named, row["box"], self._size(named, row["image"]))
        if "captions" in self.typed and "captions" in {**row, **(self.rows[0] if self.rows else {})}:
            check_captions(named, row.get("captions"))
        for key in ONCE:
            if row.get(key) is not None:
                self.kept.once(named, row[key], key)
        self.rows.append(row)

    def _size(self, entry: Entry, cell: dict[str, Any]) -> tuple[int, int]:
        if cell["path"] not in self.sizes:  # many phrases are about one picture
            self.sizes[cell["path"]] = size_of(entry, cell)
        return self.sizes[cell["path"]]

    def _picture(self, entry: Entry, name: str) -> dict[str, Any]:
        if self.find:
            return self.pictures(entry, name)
        return {"path": str(self.folder / name), "bytes": None}

    def _cell(self, entry: Entry, name: str, value: Any) -> Any:
        """A value as the type of its column; text of a CSV cell too."""
        if value is None or (value == "" and COLUMNS[name] != "string"):
            return None
        kind = COLUMNS[name]
        if name == "video":
            return self._video(entry, value)
        if kind.startswith("["):
            if isinstance(value, str) and value.lstrip().startswith("["):
                value = self._json(entry, name, value, kind)
            values = value if isinstance(value, list) else [value]
            found = [self._one(entry, name, kind[1:-1], v) for v in values]
            return check_box(entry, found) if name == "box" else found
        return self._one(entry, name, kind, value)

    def _one(self, entry: Entry, name: str, kind: str, value: Any) -> Any:
        true = isinstance(value, bool)
        if kind == "image" and isinstance(value, str) and value:
            return self._picture(entry, value)
        if kind == "image" and isinstance(value, dict) and value.get("bytes"):
            return {"path": value.get("path"), "bytes": value["bytes"]}  # embedded, as in Parquet files
        if kind == "image" and isinstance(value, dict) and isinstance(value.get("path"), str):
            return self._picture(entry, value["path"])
        if kind == "string" and isinstance(value, (str, int)) and not true:
            return str(value)  # an answer 2 is the word "2"
        if kind == "float32" and isinstance(value, (int, float)) and not true:
            return float(value)
        if kind == "int32" and not true and (isinstance(value, int) or (isinstance(value, str) and value.isdecimal())):
            return int(value)
        if kind == "bool" and (true or str(value).lower() in ("true", "false")):
            return str(value).lower() == "true"
        if kind == "[int32]" and isinstance(value, list):
            return [self._one(entry, name, "int32", v) for v in value]
        wanted = {"image": "a path", "string": "a string", "float32": "numbers", "int32": "whole numbers",
                  "bool": "true or false"}.get(kind, "a list")  # fmt: skip
        raise entry.error(f"expected {name!r} to be {wanted}, found {str(value)[:80]!r}")

    def _json(self, entry: Entry, name: str, text: str, kind: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            if kind == "[string]" and not text.rstrip().endswith("]"):
                return text  # words that begin with a bracket: "[blurred] a dog"
            raise entry.error(f"expected {name!r} to be a JSON list ({error})") from error

    def _video(self, entry: Entry, value: Any) -> str:
        if not isinstance(value, str) or not (self.folder / value).is_file():
            raise entry.error(f"the video {value!r} is not there; looked in {self.folder}")
        if self.pictures.decode:
            from trimtab.data.video import fault

            if wrong := fault(self.folder / value):
                raise entry.error(f"the video {wrong}")
        return str(self.folder / value)

    def table(self, path: Path) -> Dataset:
        """All rows; a column that some rows lack is empty there.

        Raises:
            DataError: if there is no row, or a column's values are of different kinds.
        """
        from datasets import Dataset, Features

        if not self.rows:
            why = f"; {self.kept.left_out[0]}" if self.kept.left_out else ""
            raise DataError(f"{path}: holds no rows{why}")
        names = list(dict.fromkeys(k for row in self.rows for k in row))
        columns = {n: [row.get(n) for row in self.rows] for n in names}
        typed = self.typed | ({"answer"} if "messages" in columns else set())
        types = {n: _type(path, n, columns[n], typed) for n in names}
        return Dataset.from_dict(columns, features=Features(types))


def _type(path: Path, name: str, values: list[Any], typed: Collection[str]) -> Any:
    """The type of a column: a task's own, or what its values are."""
    import pyarrow as pa
    from datasets import Features, List, Value

    if name in typed:
        return features([name])[name]
    if name == "messages":
        return List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    try:
        return Features.from_arrow_schema(pa.schema({name: pa.array(values).type}))[name]
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{path}: expected the column {name!r} to hold values of one kind ({error})") from error


# --- splits of a folder -----------------------------------------------------------------------------------------------

SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"),
          "test": ("test", "testing", "eval")}  # fmt: skip


def splits(root: Path) -> dict[str, list[Path]]:
    """Which files or folder hold which split: folders or files `train`, `validation`, `test` (`val`, `dev` and others
    are known), in the root or in `data`, and Parquet files such as `train-00000-of-00002.parquet`.

    Raises:
        FileNotFoundError: if there is no such folder.
        DataError: if two things stand for one split.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such folder")
    found: dict[str, list[Path]] = {}
    for item in sorted(p for top in (root, root / "data") if top.is_dir() for p in top.iterdir()):
        stem = item.stem.partition("-")[0] if item.suffix == ".parquet" else item.stem
        split = next((s for s, names in SPLITS.items() if stem.lower() in names), None)
        if split is None or not (item.is_dir() or item.suffix in SUFFIXES):
            continue
        before = found.setdefault(split, [])
        if before and not (before[-1].suffix == item.suffix == ".parquet" and before[-1].parent == item.parent):
            raise DataError(f"{root}: {before[-1]} and {item} both stand for {split!r}; keep one, or name the files "
                            "with the source 'files' (data.train, data.test)")  # fmt: skip
        before.append(item)
    return found


def names_of(table: Dataset, column: str) -> Sequence[str]:
    """The values of a column, each once, in order of the alphabet; an empty one says that it is not known."""
    return sorted({v for v in table[column] if v is not None and str(v).strip()})
