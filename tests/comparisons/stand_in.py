"""A broken file in the place of the file of a data set that it is most like: what its readers say of it."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.comparisons.data import SETS, content_of
from trimtab.data.base import SOURCES, Published
from trimtab.data.check import recognised
from trimtab.data.reading import Kept
from trimtab.settings import build


def nearest(path: Path, beside: dict[str, Path]) -> tuple[str, Path, Path] | None:
    """(name of the set, its folder, its file) of the file that has most names of fields, and then most words, in common
    with this one; None if there is none with a fifth of them."""
    best, found = (0.2, 0.0, 0.0), None
    for name, root in beside.items():
        for file in sorted(root.rglob(f"*{path.suffix}" if path.suffix else "part-*")):
            if not file.is_file() or file.name == "expected.json":
                continue
            mine, theirs = words(path), words(file)
            told = len(mine & theirs) / max(1, len(mine)), _shared(mine, theirs)
            # Lists of plain texts, and cut files, have no fields; of shards one is like another.
            likeness = (_shared(fields(path), fields(file)) or told[0] or (path.suffix == ".tar") / 2, *told)
            if likeness > best:
                best, found = likeness, (name, root, file)
    return found


def _shared(first: set[str], second: set[str]) -> float:
    return len(first & second) / max(1, len(first | second))


def words(path: Path) -> set[str]:
    """The words of a file's beginning, whatever it holds."""
    with path.open("rb") as file:
        return set(re.findall(r"\w+", file.read(50_000).decode("utf-8", errors="replace")))


def fields(path: Path) -> set[str]:
    """Names of fields of the file's first objects, or the cells of its first line."""
    content = content_of(path)
    if isinstance(content, str):
        return set(re.split(r"[,\t]", content.partition("\n")[0].strip()))
    found: set[str] = set()
    level: list[Any] = [content]
    for _ in range(4):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                found |= {key for key in value if not key.isdigit()}
                below += list(value.values())[:12]
            elif isinstance(value, (list, tuple)):
                below += value[:3]
        level = below
    return found


def stand_in(path: Path, name: str, root: Path, file: Path) -> None:
    """Read all of a data set with the broken file in the place of one of its own.

    Raises:
        The first error that names the file, under the broken file's own path.
    """
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder) / root.name
        for each in (p for p in root.rglob("*") if p.is_file()):
            link = top / each.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path if each == file else each)
        link = top / file.relative_to(root)
        for read in (*_tables(name, top), *_sources(top)):
            try:
                read()
            except Exception as error:
                if str(link) in str(error):
                    error.args = (str(error).replace(str(link), str(path)),)
                    raise


def _tables(name: str, root: Path) -> Iterator[Any]:
    expected = json.loads((root / "expected.json").read_text())
    for table in expected["tables"]:
        yield lambda table=table: SETS[name].read(root, table, expected)


def _sources(root: Path) -> Iterator[Any]:
    """Every split, and the vocabulary, of every form that lies in a folder."""
    for name, own in recognised(root):
        if not issubclass(SOURCES[name], Published):
            continue
        source = build(SOURCES[name], {"root": root, **own}, name)
        for split in source.splits:
            yield lambda source=source, split=split: source.read(source.tasks[0], split, Kept())
        for asked in ("answers", "classes"):
            if hasattr(source, asked):
                yield getattr(source, asked)
