"""Which rows of a table show one and the same picture, or film: nothing is decoded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from trimtab.data.images import encoded

if TYPE_CHECKING:
    from datasets import Dataset

NAMES = ("video_id", "image_id", "video", "image", "images")
"""Columns that tell what a row shows, the first that is there and says something counts."""


def identities(table: Dataset) -> list[str | None]:
    """Of each row what it shows: an id, a path, or the paths of several pictures; None where nothing tells."""
    found: list[str | None] = [None] * len(table)
    for name in NAMES:
        if name in table.column_names and None in found:
            found = [a if a is not None else b for a, b in zip(found, _named(table, name), strict=True)]
    return found


def _named(table: Dataset, column: str) -> list[str | None]:
    """A column's ids or paths; those of pictures without the pictures themselves."""
    if column not in ("image", "images"):
        return [None if value in (None, "") else f"{column} {value}" for value in table[column]]
    if column == "image":
        return paths(table, embedded=True)
    return [None if c is None else _joined([p and p.get("path") for p in c]) for c in encoded(table)[column]]


def paths(table: Dataset, embedded: bool = False) -> list[str | None]:
    """The path in each cell of the column `image`; of pictures that stand in the table itself only if `embedded`, and
    then with their size: what is left of their path is often a name that many have. No picture is read."""
    import pyarrow.compute as pc

    cells: Any = table.data.column("image")
    if not hasattr(cells.type, "names"):
        return [None] * len(table)
    found = pc.struct_field(cells, "path").to_pylist()
    inside = pc.binary_length(pc.struct_field(cells, "bytes")).to_pylist()
    for i, size in enumerate(inside):
        if size is not None:
            found[i] = f"{found[i]} of {size} bytes" if embedded and found[i] is not None else None
    order = table._indices
    return found if order is None else [found[i] for i in order.column(0).to_pylist()]


def _joined(paths: Sequence[str | None]) -> str | None:
    return " ".join(map(str, paths)) if paths and all(paths) else None


def firsts(table: Dataset) -> list[int]:
    """Of each row the first row that shows the same; of one of which nothing is known that row itself."""
    first: dict[str, int] = {}
    return [first.setdefault(name, i) if name is not None else i for i, name in enumerate(identities(table))]


def repeated(table: Dataset) -> tuple[int, int, str] | None:
    """The numbers of two rows that show the same, and what; None if no two do."""
    first: dict[str, int] = {}
    for i, name in enumerate(identities(table)):
        if name is not None and first.setdefault(name, i) != i:
            return first[name], i, name
    return None


def warn_if_same(validation: Dataset, other: Dataset, name: Literal["training", "test"]) -> None:
    """Warn if what is chosen on validation rows is chosen on those of training, or of the test."""
    if same(validation, other):
        why = "makes the test score too good" if name == "test" else "is chosen by what was learned by heart"
        warnings.warn(
            f"validation and {name} rows are the same {len(other)}: what is chosen on them (when a training ends, its "
            f"best weights, a candidate) {why}: give other rows (data.validation, held_out)",
            stacklevel=3,
        )


def same(one: Dataset, other: Dataset) -> bool:
    """Whether two tables are known to show the same in all their rows; nothing is known of a stream."""
    told = all(hasattr(table, "data") for table in (one, other)) and len(one) == len(other)
    shown = identities(one) if told else []
    return bool(shown) and None not in shown and shown == identities(other)


def check_grouped(table: Dataset, task: str) -> None:
    """Raise a ValueError if a picture stands in two rows of a table, each with captions of its own: those of the other
    row would count as wrong."""
    if (twice := repeated(table)) is not None:
        raise ValueError(
            f"task {task!r}: rows {twice[0]} and {twice[1]} show the same, {twice[2]!r}, and each would count the "
            "other's captions as wrong: give all captions of a picture in one row, a list in `captions`; the source "
            "'files' does so with data.group=true"
        )


def grouped(table: Dataset) -> Dataset:
    """One row a picture, with the captions of all its rows in their order; other columns are those of its first row.

    Raises:
        ValueError: if the table has no captions.
    """
    if "captions" not in table.column_names:
        raise ValueError(f"group: joins the captions of a picture, and there is no column 'captions' among "
                         f"{', '.join(table.column_names)}")  # fmt: skip
    told: dict[int, list[str]] = {}
    for row, captions in zip(firsts(table), table["captions"], strict=True):
        told.setdefault(row, []).extend(captions)
    kept = table.select(list(told))
    place, kind = kept.column_names, kept.features["captions"]
    joined = kept.remove_columns("captions").add_column("captions", list(told.values()), feature=kind)
    return joined.select_columns(place)


def apart(table: Dataset, held: set[int]) -> tuple[list[int], list[int]]:
    """The rows that are not held out, and those that are: a row that shows what a held one does is left out of the
    former."""
    names = identities(table)
    seen = {names[i] for i in held} - {None}
    rest = [i for i in range(len(table)) if i not in held and names[i] not in seen]
    return rest, sorted(held)


def spread(table: Dataset, share: float) -> tuple[list[int], list[int]]:
    """The rows of most pictures, and those of a share of them, evenly spread over the table."""
    names = [name if name is not None else f"row {i}" for i, name in enumerate(identities(table))]
    order = list(dict.fromkeys(names))
    count = round(len(order) * share)
    held = {order[int((i + 0.5) * len(order) / count)] for i in range(count)}
    return [i for i, n in enumerate(names) if n not in held], [i for i, n in enumerate(names) if n in held]
