"""Readers of data sets against tables of rows: a folder with `expected.json` is a data set, in its official layout.

Each table of `expected.json` is a case. Which data set a folder holds is told by the file, or by the names of files in
it; the folder's own name is the last resort. A folder with `index.json` that lists broken files has a case for each:
the reader must raise an error that names the file and the row.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conformance import FOLDERS
from trimtab.data.reading import DataError, RowError

Rows = list[dict[str, Any]]
Reading = Callable[[Path, str, dict[str, Any]], Rows | None]
ROW = re.compile(
    r"line \d+|\[\d+\]|\bid '|\bid \"|the names|the batch|row \d+|record \d+|question '|index \d+|prediction.*: \S+"
)


@dataclass(frozen=True)
class DataSet:
    """How a data set's tables are read.

    Attributes:
        read: folder, name of a table, `expected.json` -> its rows, None for a table that it does not know.
        files: patterns of names that only this set has.
    """

    read: Reading
    files: tuple[str, ...]


SETS: dict[str, DataSet] = {}
BROKEN: list[tuple[Callable[[Path, Any], bool], Callable[[Path, dict[str, Path]], None]]] = []


def data_set(name: str, *files: str) -> Callable[[Reading], Reading]:
    """Register how the tables of a data set are read; `files` are patterns of names that tell it from others."""

    def add(read: Reading) -> Reading:
        SETS[name] = DataSet(read, files)
        return read

    return add


def broken(fits: Callable[[Path, Any], bool]) -> Callable[[Callable], Callable]:
    """Register what reads a kind of broken file.

    Args:
        fits: path and content (JSON, or text, or None where it is neither) -> whether it is of the kind.

    The function gets the path and the data sets beside it by name, and must raise.
    """

    def add(read: Callable[[Path, dict[str, Path]], None]) -> Callable:
        BROKEN.append((fits, read))
        return read

    return add


def reports(folder: Path) -> Iterator[dict[str, Any]]:
    """A line for each case that a folder, or one in it, holds."""
    for inner in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        if (inner / "expected.json").is_file():
            yield from _tables(inner)
        if _is_index(inner / "index.json"):
            yield from _broken(inner)


FOLDERS.append(reports)


def _is_index(path: Path) -> bool:
    if not path.is_file():
        return False
    found = json.loads(path.read_text())
    return isinstance(found, list) and all(isinstance(e, dict) and {"file", "what_is_wrong"} <= set(e) for e in found)


def which(folder: Path, expected: dict[str, Any]) -> str | None:
    """The name of the data set in a folder, None if it is none of those that are registered."""
    if (told := str(expected.get("dataset"))) in SETS:
        return told
    for name, each in SETS.items():
        if any(next(folder.rglob(pattern), None) for pattern in each.files):
            return name
    return folder.name if folder.name in SETS else None


def _tables(folder: Path) -> Iterator[dict[str, Any]]:
    expected = json.loads((folder / "expected.json").read_text())
    name = which(folder, expected)
    for table, wanted in expected["tables"].items():
        line: dict[str, Any] = {"case": f"{folder.name}/{table}", "kind": f"data {name or folder.name}"}
        if name is None:
            yield line | {"pass": None, "skipped": ["no comparison for this data set"]}
            continue
        try:
            found = SETS[name].read(folder, table, expected)
        except Exception as error:  # whatever it is: this case has failed, and the next is compared
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name}, line {at.lineno}"
            yield line | {"pass": False, "error": f"{type(error).__name__}: {error} ({where})"}
            continue
        if found is None:
            yield line | {"pass": None, "skipped": ["no comparison for this table"]}
        else:
            yield line | differences(found, wanted)


def differences(found: Rows, wanted: dict[str, Any]) -> dict[str, Any]:
    """Rows against a table: whether all agree, the worst difference of a number, and the first cell that differs."""
    columns, rows = wanted["columns"], [dict(zip(wanted["columns"], row, strict=True)) for row in wanted["rows"]]
    out: dict[str, Any] = {"rows": len(found), "checks": len(rows) * len(columns), "max_error": 0.0, "tolerance": 1e-6}
    if len(found) != wanted["n_rows"]:
        return out | {"pass": False, "difference": f"expected {wanted['n_rows']} rows, found {len(found)}"}
    key = "question_id"
    if key in columns and [r[key] for r in rows] == sorted(r[key] for r in rows):  # a table sorted by its ids
        found = sorted(found, key=lambda r: type(rows[0][key])(r[key]))
    for i, (ours, theirs) in enumerate(zip(found, rows, strict=False)):
        for column in columns:
            error = 0.0 if column not in ours else distance(ours[column], theirs[column])
            if column not in ours or error > 1e-6:
                have = repr(ours.get(column, "no such column"))[:200]
                told = f"row {i}, {column!r}: expected {theirs[column]!r}"[:300]
                return out | {"pass": False, "max_error": error, "difference": f"{told}, found {have}"}
            out["max_error"] = max(out["max_error"], error)
    return out | {"pass": True}


def distance(found: Any, wanted: Any) -> float:
    """The largest difference of numbers in two cells; infinite where anything else differs.

    What is not known is empty in our tables; ids are strings there.
    """
    if wanted is None:
        return 0.0 if found in (None, "", []) else float("inf")
    if isinstance(wanted, list) and isinstance(found, (list, tuple)):
        pairs = list(zip(found, wanted, strict=False))
        return max((distance(f, w) for f, w in pairs), default=0.0) if len(found) == len(wanted) else float("inf")
    if isinstance(wanted, dict) and isinstance(found, dict):
        same = found.keys() == wanted.keys()
        return max((distance(found[k], w) for k, w in wanted.items()), default=0.0) if same else float("inf")
    if isinstance(wanted, bool) or isinstance(found, bool) or isinstance(wanted, str):
        return 0.0 if found == wanted and type(found) is type(wanted) else float("inf")
    if isinstance(wanted, int) and isinstance(found, str):
        return 0.0 if found == str(wanted) else float("inf")
    if isinstance(wanted, (int, float)) and isinstance(found, (int, float)):
        return abs(found - wanted)
    return float("inf")


def _broken(folder: Path) -> Iterator[dict[str, Any]]:
    beside = {}
    for inner in sorted(p for p in folder.parent.iterdir() if (p / "expected.json").is_file()):
        name = which(inner, json.loads((inner / "expected.json").read_text()))
        if name is not None:
            beside[name] = inner
    from tests.comparisons.stand_in import nearest, stand_in  # which needs what is here

    for entry in json.loads((folder / "index.json").read_text()):
        path = folder / entry["file"]
        line: dict[str, Any] = {"case": f"{folder.name}/{path.name}", "kind": "broken file"}
        content = content_of(path)
        read = next((read for fits, read in BROKEN if fits(path, content)), None)
        like = nearest(path, beside)
        if read is None and like is None:
            yield line | {"pass": None, "skipped": [f"no comparison: {entry['what_is_wrong']}"]}
            continue
        try:
            if read is not None:
                read(path, beside)
            if like is not None:
                stand_in(path, *like)
            yield line | {"pass": False, "error": f"no error; {entry['what_is_wrong']}"}
        except Exception as error:
            told, meant = f"{type(error).__name__}: {error}", isinstance(error, ValueError)
            yield line | {"pass": meant and path.name in told and (_whole(error) or bool(ROW.search(told))),
                          "told": told}  # fmt: skip


def _whole(error: Exception) -> bool:
    """Whether the fault is of a file as a whole, which has no row."""
    return isinstance(error, DataError) and not isinstance(error, RowError)


def content_of(path: Path) -> Any:
    """What a file holds: JSON, the first object of JSON lines in a tuple, else text; None where it is no text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    for cut in (text, text.partition("\n")[0]):
        try:
            found = json.loads(cut)
        except ValueError:
            continue
        return found if cut is text and path.suffix != ".jsonl" else (found,)
    return text


def rows_of(table: Any, root: Path) -> Rows:
    """The rows of a reader's table, pictures as paths relative to the data set's folder."""
    from datasets import Image, List

    if "image" in table.column_names:
        table = table.cast_column("image", Image(decode=False))
    if "images" in table.column_names:
        table = table.cast_column("images", List(Image(decode=False)))

    def relative(cell: dict[str, Any]) -> str:
        return Path(cell["path"]).relative_to(root).as_posix()

    rows = [dict(row) for row in table]
    for row in rows:
        if "image" in row:
            row["image"] = relative(row["image"])
        if "images" in row:
            row["images"] = [relative(cell) for cell in row["images"]]
    return rows
