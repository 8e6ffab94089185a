"""Reading files of rows with errors that name the file and the row: JSON, JSON lines, CSV and pictures.

    kept = Kept(on_error="skip")
    for entry in json_rows(path, "images"):        # an Entry is one object of a file, which knows where it stands
        with kept.row():                           # an error of the row stops the reading, or leaves the row out
            kept.add(image_id=kept.once(entry, entry.id("imgid")), captions=...)
    kept.left_out                                  # what was left out and why, one sentence a row

An error of a whole file (not there, cut off, no JSON) always stops: nobody knows which rows are lost.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from trimtab.data.entry import DataError, Entry, NotThere, RowError, short

log = logging.getLogger(__name__)

OnError = Literal["stop", "skip"]


# --- files ------------------------------------------------------------------------------------------------------------


def read_json(path: Path, unique: bool = False) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        unique: look for keys that stand twice in an object, of which Python would keep the last; takes a while.

    Raises:
        DataError: if it is not there, not text in UTF-8, cut off or not JSON, with line and column; or a key that
            stands twice.
    """
    text = _text(path)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DataError(f"{path}, id {twice!r}: this key stands twice in an object; ids must differ")
        return found

    try:
        return json.loads(text, object_pairs_hook=once if unique else None)
    except json.JSONDecodeError as error:
        cut = "the file seems to be cut off: " if error.pos >= len(text.rstrip()) or "Unterminated" in error.msg else ""
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: {cut}expected JSON ({error.msg})"
        ) from error


def json_rows(path: Path, key: str | None = None) -> Iterator[Entry]:
    """The objects of a JSON list, or of the list under `key` of a JSON object.

    Raises:
        DataError: if the file cannot be read or holds something else.
    """
    found = read_json(path)
    if key is not None:
        if not isinstance(found, dict) or key not in found:
            what = f"an object with {', '.join(map(repr, found))}" if isinstance(found, dict) else short(found)
            raise DataError(f"{path}: expected a JSON object with the list {key!r}, found {what}")
        found = found[key]
    if not isinstance(found, list):
        raise DataError(f"{path}: expected {f'{key!r} to be ' if key else ''}a JSON list, found {short(found)}")
    for i, values in enumerate(found):
        yield Entry(values, path, f"{key or 'entry'}[{i}]")


def json_table(path: Path) -> Iterator[tuple[str, Entry]]:
    """The objects of a JSON object, each with the key under which it stands.

    Raises:
        DataError: if the file cannot be read or holds something else, or an id stands twice.
    """
    found = read_json(path, unique=True)
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object from ids to rows, found {short(found)}")
    for key, values in found.items():
        yield key, Entry(values, path, f"id {key!r}")


def json_lines(path: Path) -> Iterator[Entry]:
    """The objects of a file with one JSON object a line; blank lines are passed over.

    Raises:
        DataError: if the file cannot be read, or holds one JSON list.
    """
    for number, line in enumerate(_text(path).split("\n"), 1):  # not splitlines: a text may hold other line ends
        if not line.strip():
            continue
        try:
            values, fault = json.loads(line), ""
        except json.JSONDecodeError as error:
            values, fault = None, f"expected a JSON object ({error.msg}, column {error.colno})"
        if isinstance(values, list):
            raise DataError(f"{path}, line {number}: expected one JSON object a line, found a JSON list")
        yield Entry(values, path, f"line {number}", fault)


def csv_rows(path: Path, columns: Sequence[str], delimiter: str = ",") -> Iterator[Entry]:
    """The rows of a CSV file with a header, by column; quoted cells may hold commas and line ends.

    Raises:
        DataError: if the file cannot be read, its header lacks one of `columns` or has one twice, or a quote is not
            closed: it would swallow the rows after it.
    """
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if missing := [c for c in columns if c not in header]:
            raise DataError(f"{path}, line 1: expected a header with {missing[0]!r}, found {short(header)}")
        if len(set(header)) < len(header):
            twice = next(name for i, name in enumerate(header) if name in header[:i])
            raise DataError(f"{path}, line 1: the column {twice!r} stands twice in the header")
        for cells in reader:
            if cells:
                fault = f"expected {len(header)} cells, found {len(cells)}" if len(cells) != len(header) else ""
                yield Entry(dict(zip(header, cells, strict=False)), path, f"line {reader.line_num}", fault)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, without line ends; blank lines too.

    Raises:
        DataError: if the file cannot be read.
    """
    yield from enumerate((line.removesuffix("\r") for line in _text(path).removesuffix("\n").split("\n")), 1)


def _text(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8, found other bytes at position {error.start}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def find_file(root: Path, *names: str, depth: int = 3) -> Path:
    """The file of one of these names in a folder or in those below it; the nearest to the top.

    Raises:
        NotThere: if there is none.
        DataError: if two are equally near.
    """
    found = look_for(root, *names, depth=depth)
    if found is None:
        raise NotThere(f"{root}: expected {' or '.join(names)} in it or in a folder below, found none")
    return found


def look_for(root: Path, *names: str, depth: int = 3) -> Path | None:
    """As `find_file`, but None where there is none.

    Raises:
        DataError: if two are equally near.
    """
    if not Path(root).is_dir():
        raise DataError(f"{root}: there is no such folder")
    level = [Path(root)]
    for _ in range(depth + 1):
        found = [folder / name for folder in level for name in names if (folder / name).is_file()]
        if len({f.parent for f in found}) > 1:
            raise DataError(
                f"{root}: found {' and '.join(map(str, found[:2]))}; which is meant? Give the folder of one"
            )
        if found:
            return found[0]
        level = [Path(e.path) for f in level for e in sorted(os.scandir(f), key=lambda e: e.name) if e.is_dir()]
    return None


# --- rows -------------------------------------------------------------------------------------------------------------


class Ids:
    """Ids that have been met."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}

    def once(self, entry: Entry, key: str, kind: str = "id") -> str:
        """The key, if no row before had it.

        Raises:
            RowError: if one had.
        """
        seen = self._seen.setdefault(kind, set())
        if key in seen:
            raise entry.error(f"the {kind} {key!r} stands twice; ids must differ")
        seen.add(key)
        return key


class Kept(Ids):
    """Rows that are kept, and those that are left out.

    Args:
        on_error: `stop` raises the first error of a row; `skip` leaves the row out.

    Attributes:
        left_out: a sentence for each row left out, in order: file, row, and what is wrong.
    """

    CHUNK = 20_000  # rows as Python objects at a time; then they become Arrow, which takes a tenth of the memory

    def __init__(self, on_error: OnError = "stop"):
        super().__init__()
        self.on_error = on_error
        self._left: dict[str, None] = {}  # a file that is read for two splits says each thing once
        self._rows: list[dict[str, Any]] = []
        self._tables: list[Any] = []
        self._features: Any = None

    @contextmanager
    def row(self) -> Iterator[None]:
        """Everything about one row stands in this: what goes wrong with it stops the reading or leaves it out."""
        try:
            yield
        except RowError as error:
            if self.on_error == "stop":
                raise
            self._left[str(error)] = None

    @property
    def left_out(self) -> list[str]:
        return list(self._left)

    def add(self, **columns: Any) -> None:
        """Keep a row; its columns are those of `trimtab.data.base.COLUMNS`."""
        self._rows.append(columns)
        if len(self._rows) >= self.CHUNK:
            self._flush()

    def __len__(self) -> int:
        return len(self._rows) + sum(map(len, self._tables))

    def _flush(self) -> None:
        from datasets import Dataset

        from trimtab.data.base import features

        if self._features is None:
            self._features = features(self._rows[0])
        columns = {name: [row[name] for row in self._rows] for name in self._features}
        self._tables.append(Dataset.from_dict(columns, features=self._features))
        self._rows = []

    def tell(self, where: str, kept: int) -> None:
        """Count and list in the log what was left out, beside so many rows that were kept."""
        if left := self.left_out:
            few = "\n  ".join(left[:20])
            more = f"\n  and {len(left) - 20} more" if len(left) > 20 else ""
            log.warning("%s: left out %d, kept %d rows:\n  %s%s", where, len(left), kept, few, more)

    def table(self, where: str) -> Any:
        """All rows as a `datasets.Dataset`; what was left out is counted and listed in the log.

        Args:
            where: the name of the table in messages.

        Raises:
            DataError: if no row is left.
        """
        from datasets import concatenate_datasets

        self.tell(where, len(self))
        if not len(self):
            raise DataError(f"{where}: holds no rows{f'; {self.left_out[0]}' if self.left_out else ''}")
        if self._rows:
            self._flush()
        return concatenate_datasets(self._tables) if len(self._tables) > 1 else self._tables[0]


class Pictures:
    """The picture files of a data set. Each folder is listed once, so that asking for 100,000 names is quick.

    Args:
        folders: where they may lie, in the order in which they are tried.
        decode: look whether each can be decoded too, which takes milliseconds a picture.
    """

    def __init__(self, *folders: Path, decode: bool = False):
        self.folders, self.decode = list(dict.fromkeys(map(Path, folders))), decode
        self._listed: dict[Path, set[str]] = {}
        self._faults: dict[Path, str] = {}

    def __call__(self, entry: Entry, name: str) -> dict[str, Any]:
        """A cell of a picture column: `name` is a path below one of the folders.

        Raises:
            RowError: if the picture is in none of them, or cannot be decoded where that is asked.
        """
        path = self.find(name)
        if path is None:
            raise entry.error(f"the picture {name!r} is not there; looked in {', '.join(map(str, self.folders))}")
        if self.decode and (fault := self._fault(path)):
            raise entry.error(f"the picture {fault}")
        return {"path": str(path), "bytes": None}

    def find(self, name: str) -> Path | None:
        """The path of a picture, None if there is none of that name."""
        for folder in self.folders:
            path = folder / name
            if path.parent not in self._listed:
                listed = os.scandir(path.parent) if path.parent.is_dir() else ()
                self._listed[path.parent] = {e.name for e in listed if e.is_file()}
            if path.name in self._listed[path.parent]:
                return path
        return None

    def _fault(self, path: Path) -> str:
        """What is wrong with a picture's file, an empty string if nothing is."""
        if path not in self._faults:
            from trimtab.data.images import ImageError, decode

            try:
                decode({"path": str(path)})
                self._faults[path] = ""
            except ImageError as error:
                self._faults[path] = str(error)
        return self._faults[path]
