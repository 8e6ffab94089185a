"""What lies in a folder or file: which data set, in which form, how many rows a split has, and what is missing.

A reader says by which names of files its forms are known (`Published.marks`); a user's own files are known by how they
end. Nothing is taken from the name of the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.data import tables
from trimtab.data.base import NEEDED, SOURCES, Published, read_by
from trimtab.data.formats.cc3m import tsv
from trimtab.data.reading import DataError, Kept, NotThere
from trimtab.settings import build

if TYPE_CHECKING:
    from datasets import Dataset

DEPTH = 5  # folders below the one that is looked at


@dataclass
class SplitFound:
    """A split that was read.

    Attributes:
        rows: how many rows can be used.
        left_out: a sentence for each row that cannot.
        missing: why the split as a whole cannot be read; empty if it can.
        absent: it has no file here, which is usual: not every split is published, or fetched.
        more: reading stopped at the source's setting `rows`; there may be more.
    """

    name: str
    rows: int = 0
    left_out: list[str] = field(default_factory=list)
    missing: str = ""
    absent: bool = False
    more: bool = False


@dataclass
class Found:
    """A data set that was found.

    Attributes:
        source: its name in a recipe's `data`.
        settings: those that reach it, beside the name.
        task: for which its rows were read; the first that it serves.
        tasks: all that it serves.
        lacking: task -> columns that it would need, for a user's table that serves no task.
        samples: the first rows of the first split that has any.
    """

    source: str
    settings: dict[str, Any]
    about: str = ""
    task: str = ""
    tasks: tuple[str, ...] = ()
    lacking: dict[str, tuple[str, ...]] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    splits: list[SplitFound] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


def check(path: Path, source: str | None = None, settings: Mapping[str, Any] | None = None, samples: int = 3,
          decode: bool = False) -> list[Found]:  # fmt: skip
    """Everything that a folder or file is found to be.

    Args:
        source: read it as this; None finds out.
        settings: of the source, beside its root.
        samples: how many rows to give.
        decode: decode every picture; otherwise only those of the samples are.

    Raises:
        FileNotFoundError: if there is no such path.
        DataError: if it is nothing that a reader knows.
        ValueError: if the source or a setting is unknown.
    """
    path, settings = Path(path), dict(settings or {})
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if source is not None:
        choices = [(source, {"root": path} | settings if "root" in _fields(source) else settings)]
    else:
        choices = [(name, {"root": path} | own | settings) for name, own in recognised(path)]
    found = [_published(name, own, samples, decode) for name, own in choices if _is_published(name)]
    found += [_own(path, name, own, samples) for name, own in choices if not _is_published(name)]
    if source is None and not found:
        found += _loose(path, settings, samples)
    for later, each in enumerate(found):  # a set in several forms is shown once
        if any(before.source == each.source and before.samples for before in found[:later]):
            each.samples = []
    if not found:
        raise DataError(
            f"{path}: expected data in a form that a reader knows, found none. Known sets: "
            f"{', '.join(n for n in SOURCES if _is_published(n))}; own data: {', '.join(tables.SUFFIXES)}, a folder of "
            "pictures with metadata.jsonl, or what `datasets` saved. Name the source with --source"
        )
    return found


def _fields(source: str) -> Sequence[str]:
    return list(getattr(SOURCES[source], "__dataclass_fields__", ()))


def _is_published(name: str) -> bool:
    return issubclass(SOURCES[name], Published)


def recognised(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The published sets, and their forms, whose files lie in a folder."""
    top = path.resolve().name
    names = {f"/{top}"} if path.is_file() else {f"/{top}/{name}" for name in _files(path, DEPTH)}
    for source, cls in SOURCES.items():
        for form, patterns in getattr(cls, "marks", {}).items():
            if any(fnmatchcase(name, p if "/" in p else f"*/{p}") for p in patterns for name in names):
                yield source, {"form": form} if form else {}


def _files(folder: Path, depth: int) -> Iterator[str]:
    """The paths of all files below a folder, from there on."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir() and depth:
            yield from (f"{entry.name}/{name}" for name in _files(Path(entry.path), depth - 1))
        elif entry.is_file():
            yield entry.name


def _published(name: str, settings: dict[str, Any], samples: int, decode: bool) -> Found:
    source: Published = build(SOURCES[name], {"on_error": "skip" if decode else "stop", **settings}, f"data {name!r}")
    shown = {k: v for k, v in settings.items() if k != "root"}
    found = Found(name, shown, _about(SOURCES[name]), source.tasks[0], source.tasks)
    for split in source.splits:
        kept, each = Kept("skip"), SplitFound(split)
        try:
            source.read(found.task, split, kept)
        except NotThere as error:
            each.missing, each.absent = str(error), True
        except (ImportError, ValueError) as error:
            each.missing = str(error)
        each.rows, each.left_out = len(kept), kept.left_out
        each.more = source.rows is not None and each.rows >= source.rows
        found.splits.append(each)
        if len(kept) and not found.samples:
            table = kept.table(f"{name} {split}")
            found.columns, found.samples = list(table.column_names), _first(table, samples)
    return found


def _about(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def _first(table: Dataset, count: int) -> list[dict[str, Any]]:
    from datasets import Image, List

    for column, kind in table.features.items():  # cells stay as they are: a broken picture is shown as such
        if isinstance(kind, Image):
            table = table.cast_column(column, Image(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Image):
            table = table.cast_column(column, List(Image(decode=False)))
    return [dict(row) for row in table.select(range(min(count, len(table))))]


# --- a user's own data ------------------------------------------------------------------------------------------------


def _own(path: Path, name: str, settings: dict[str, Any], samples: int) -> Found:
    """A source that is no published set, such as `imagefolder`."""
    build(SOURCES[name], settings, f"data {name!r}")  # raises for a wrong setting
    if "root" not in _fields(name):
        raise DataError(f"data {name!r} has no folder to look at; it is for recipes")
    return _tables(name, tables.splits(path), settings, samples)


def _loose(path: Path, settings: dict[str, Any], samples: int) -> list[Found]:
    """A user's files: one, or a folder with a file or folder a split."""
    if path.suffix == ".tsv" and path.is_file() and not settings:
        kept = Kept("skip")
        rows = sum(1 for _ in tsv(path, kept))
        if rows:
            why = "captions and addresses without pictures: fetch them (img2dataset) and read the shards"
            return [Found("webdataset", {}, splits=[SplitFound(path.name, rows, kept.left_out, why)])]
    known = path.suffix in tables.SUFFIXES if path.is_file() else bool(tables.ready(path)) or _pictured(path)
    if known:
        return [_tables("files", {path.name: [path]}, settings, samples)]
    splits = tables.splits(path) if path.is_dir() else {}
    if not splits:
        return []
    saved = any(tables.ready(p) for paths in splits.values() for p in paths)
    folders = all(p.is_dir() for paths in splits.values() for p in paths)
    return [_tables("datasets" if saved else "imagefolder" if folders else "files", splits, settings, samples)]


def _pictured(folder: Path) -> bool:
    return any((folder / name).is_file() for name in tables.METADATA)


def _tables(name: str, splits: Mapping[str, Sequence[Path]], settings: dict[str, Any], samples: int) -> Found:
    found = Found(name, {k: v for k, v in settings.items() if k != "root"})
    for split, paths in splits.items():
        each = SplitFound(split)
        found.splits.append(each)
        for path in paths:
            try:
                table, left_out = _look(path, settings)
            except (ValueError, OSError) as error:
                each.missing = str(error)
                continue
            each.rows, each.left_out = each.rows + len(table), each.left_out + left_out
            if not found.samples:
                found.columns, found.samples = list(table.column_names), _first(table, samples)
    found.tasks, found.lacking = served(found.columns)
    found.task = found.tasks[0] if found.tasks else ""
    return found


def _look(path: Path, settings: dict[str, Any]) -> tuple[Dataset, list[str]]:
    """A table whose columns are of the types of the tasks that it serves."""
    own = settings.get("columns"), settings.get("pictures")
    tasks, _ = served(tables.look(path, *own, typed=())[0].column_names)
    return tables.look(path, *own, typed={name for task in tasks for name in read_by(task)})


def served(columns: Sequence[str]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The tasks that a table with these columns serves, and what it lacks for the others of which it has a part."""
    lacking: dict[str, tuple[str, ...]] = {}
    for task, groups in NEEDED.items():
        lacking[task] = min((tuple(c for c in group if c not in columns) for group in groups), key=len)
    tasks = tuple(task for task, missing in lacking.items() if not missing)
    return tasks, {t: missing for t, missing in lacking.items() if missing and len(missing) < 3}
