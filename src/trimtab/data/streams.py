"""Rows that come one after the other, as `datasets` streams them, by number: for sets larger than memory and disk.

    file 1   rows 0 .. a - 1   |  window  |  window  | ...     an order goes through the files as they are drawn, in a
    file 2   rows a .. b - 1   |  window  | ...                file from window to window, and mixes each window

Training asks for rows by number, in an order that depends on the seed and the epoch alone (`data/draws.py`). A window
of neighbours is held, and a stream can begin at any row. So workers, several processes and a resumed training get the
same rows as one process that was never interrupted; each of them reads the whole stream and keeps its own rows.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.data import draws
from trimtab.data.entry import DataError, Entry
from trimtab.data.shards import stamp

WINDOW = 1000  # rows that are held and mixed
AT_ONCE = 100  # rows that are turned into Python objects together
SUFFIXES = (".parquet", ".jsonl", ".ndjson")


class Part(NamedTuple):
    """A stream that begins anew whenever it is asked for, such as a file.

    Attributes:
        open: gives its rows from the first on, an `IterableDataset` whose pictures are not decoded. It is made when the
            part is read, since it holds an open file.
        length: how many rows it has.
        name: of the file, for messages.
    """

    open: Callable[[], Any]
    length: int
    name: str


class Streamed:
    """A table of streams: `len(table)`, `table[number]`, and `table["column"]`, for which all rows are read.

    Args:
        parts: the streams, one after the other.
        make: what becomes of a row: is given the row, its stream's name and its number there.
        window: rows that are held.
        told: what tells the data from others without reading them, such as files with sizes and times.

    Raises:
        DataError: if there is no row, also later if a stream cannot be read or has fewer rows than it had.
    """

    def __init__(self, parts: Sequence[Part], make: Callable[[dict[str, Any], str, int], dict[str, Any]] | None = None,
                 window: int = WINDOW, told: str = ""):  # fmt: skip
        self.parts, self.make, self.window, self.told = list(parts), make, window, told
        self.ends = list(accumulate(part.length for part in parts))
        if not self.ends or not self.ends[-1]:
            raise DataError(f"{parts[0].name if parts else 'stream'}: holds no rows")
        self._held: tuple[int, int, list[dict[str, Any]]] | None = None  # part, first row, rows
        self._at: tuple[int, int, int] | None = None  # process, part, and row at which `_rows` goes on
        self._rows: Iterator[dict[str, Any]] = iter(())

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    @property
    def features(self) -> dict[str, Any]:
        return dict.fromkeys(self.column_names)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, which: int | str) -> Any:
        if isinstance(which, str):
            return [row.get(which) for row in self]
        if not -len(self) <= which < len(self):
            raise IndexError(f"row {which} of a stream of {len(self)} rows")
        which %= len(self)
        part = bisect.bisect_right(self.ends, which)
        own = which - (self.ends[part - 1] if part else 0)
        start = own - own % self.window
        if self._held is None or self._held[:2] != (part, start):
            self._held = (part, start, self._read(part, start))
        row = self._held[2][own - start]
        return dict(row) if self.make is None else self.make(row, self.parts[part].name, own)

    def _read(self, part: int, start: int) -> list[dict[str, Any]]:
        opened, count, name = self.parts[part]
        wanted = min(self.window, count - start)
        try:
            # A file that was opened before a worker was forked is shared with it, with its position.
            if self._at != (os.getpid(), part, start):
                rows = opened()
                self._rows = _each(rows.skip(start) if start else rows)
            found = list(islice(self._rows, wanted))
        except Exception as error:  # pyarrow and datasets have many kinds of errors for damaged files
            self._at = None
            raise DataError(f"{name}: cannot be read after row {start} ({type(error).__name__}: {error})") from error
        if len(found) < wanted:
            raise DataError(f"{name}: expected {count} rows, as were counted at the start, found {start + len(found)}")
        self._at = (os.getpid(), part, start + wanted)
        return found

    def order(self, seed: int, epoch: int) -> list[int]:
        """The numbers of all rows in the order of an epoch."""
        return draws.windowed([part.length for part in self.parts], self.window, seed, epoch)

    def with_window(self, window: int) -> Streamed:
        """The same rows, of which so many are held and mixed."""
        return Streamed(self.parts, self.make, window, self.told)


def order_of(table: Any, seed: int, epoch: int, buffer: int | None = None) -> list[int]:
    """The numbers of a table's rows in the order of an epoch; see `draws.order`."""
    return table.order(seed, epoch) if isinstance(table, Streamed) else draws.order(len(table), seed, epoch, buffer)


def numbered(table: Any, buffer: int | None = None) -> Any:
    """A table whose rows can be asked for by number: itself, or an `IterableDataset` of `datasets` as `Streamed`, whose
    rows are counted by reading them once.

    Args:
        table: what a person gives.
        buffer: rows of a stream that are held and mixed; None for the stream's own, or `WINDOW`.

    Raises:
        TypeError: if it is neither.
        DataError: if a stream has no rows.
    """
    from datasets import IterableDataset

    if isinstance(table, IterableDataset):
        rows = _undecoded(table)
        table = Streamed([Part(partial(_same, rows), sum(1 for _ in _each(rows)), "stream")])
    elif not hasattr(table, "__len__") or not hasattr(table, "__getitem__"):
        raise TypeError(
            f"expected a table of `datasets` (Dataset or IterableDataset), found {type(table).__name__}: training "
            "takes its rows by number"
        )
    return table.with_window(buffer) if isinstance(table, Streamed) and buffer else table


def _same(rows: Any) -> Any:
    return rows


def files(paths: Sequence[Path], columns: dict[str, str], folder: Path, typed: set[str]) -> Streamed:
    """The rows of Parquet or JSON-lines files, which are not read yet, as `tables.read` gives them.

    Args:
        paths: the files, in order.
        columns: a task's column -> the files'.
        folder: from which paths of pictures go out.
        typed: columns that must be of a task's type.

    Raises:
        DataError: if a file is of another kind, or cannot be read, also later with the row.
    """
    from trimtab.data import tables

    def make(row: dict[str, Any], name: str, number: int) -> dict[str, Any]:
        return tables.one(Entry(row, Path(name), f"row {number}"), columns, folder, typed)

    parts, told = [], []
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)} for `stream: true`")
        try:
            rows = _opened(path)
            parts.append(Part(partial(_opened, path), _count(path), str(path)))
        except Exception as error:
            raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
        told.append(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}")
        if path.suffix != ".parquet" or not _holds_bytes(path):
            told += _pictures(make, rows, path)
    return Streamed(parts, make, told=f"{told} {sorted(columns.items())}")


def _opened(path: Path) -> Any:
    """The rows of a file."""
    from datasets import IterableDataset, load_dataset

    if path.suffix == ".parquet":
        return _undecoded(load_dataset("parquet", data_files=str(path), split="train", streaming=True))
    # `datasets` makes times of words that look like dates
    return IterableDataset.from_generator(_lines, gen_kwargs={"path": str(path)})


def _pictures(make: Callable[[dict[str, Any], str, int], dict[str, Any]], rows: Any, path: Path) -> list[str]:
    """Sizes and times of the files that the first rows name, a window of them: they may be other pictures than before.
    What is wrong with a row is told when it is read."""
    found = []
    with suppress(ValueError, OSError):
        for number, row in enumerate(islice(rows, WINDOW)):
            cells = make(row, str(path), number)
            found += [stamp(c["path"]) for c in (cells.get("image"), *(cells.get("images") or ()))
                      if isinstance(c, dict) and not c.get("bytes") and c.get("path")]  # fmt: skip
            found += [stamp(cells["video"])] if "video" in cells else []
    return found


def _holds_bytes(path: Path) -> bool:
    """Whether a Parquet file holds pictures or other bytes, by its metadata: to see its rows is to read them all."""
    from pyarrow import parquet

    told = parquet.read_metadata(path)
    columns = [c for c in range(told.num_columns) if (kind := told.schema.column(c)).physical_type == "BYTE_ARRAY"
               and kind.logical_type.type == "NONE"]  # fmt: skip
    parts = [told.row_group(g).column(c) for g in range(told.num_row_groups) for c in columns]
    return any(not p.statistics or p.statistics.null_count != p.num_values for p in parts)


def _lines(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines, as they are written."""
    with Path(path).open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object a line, found {line.strip()[:40]!r}")
                yield row


def _each(rows: Any) -> Iterator[dict[str, Any]]:
    """Every row of an `IterableDataset`, also in a worker process: its own iterator would divide the rows among the
    workers of torch's loader, each of which needs all of them here."""
    for batch in rows.iter(batch_size=AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _undecoded(rows: Any) -> Any:
    """The stream with pictures as bytes and paths."""
    from datasets import Image, List

    for name, kind in (rows.features or {}).items():
        if isinstance(kind, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(getattr(kind, "feature", None), Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows


def _count(path: Path) -> int:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_metadata(path).num_rows
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
