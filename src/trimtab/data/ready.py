"""Tables that have types already: Parquet files, and folders that `datasets` saved; and what rows of all kinds of files
must hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.data.base import COLUMNS, features
from trimtab.data.boxes import clamped, size_of
from trimtab.data.identity import paths
from trimtab.data.reading import DataError, Entry, Kept, OnError
from trimtab.registry import unknown

if TYPE_CHECKING:
    from datasets import Dataset

ONCE = ("question_id", "identifier", "pair_id")  # ids of rows; a picture's id may stand in many
FOLDER_SAVED = "dataset_info.json"


# --- what a row must hold ---------------------------------------------------------------------------------------------


def check_captions(entry: Entry, captions: Any) -> None:
    """RowError unless there is a caption, and each says something."""
    told = list(captions or ())
    if not told or not all(isinstance(c, str) and c.strip() for c in told):  # nothing to train on or to score
        raise entry.error(f"expected 'captions' to hold at least one caption, found {told}")


def check_box(entry: Entry, box: Sequence[float]) -> list[float]:
    """The box; RowError unless it is one."""
    if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
        raise entry.error(f"expected 'box' to be left, top, right, bottom with an area, found {list(box)}")
    return list(box)


def check_inside(entry: Entry, box: Sequence[float], size: tuple[int, int]) -> None:
    """RowError unless some of a box lies in its picture, and it is given in pixels."""
    left, top, right, bottom = clamped(list(box), size)
    if right <= left or bottom <= top:
        raise entry.error(f"expected 'box' in its picture of {size[0]} x {size[1]} pixels, found {list(box)}")
    if max(box) < 1:
        raise entry.error(f"expected 'box' in pixels of its picture of {size[0]} x {size[1]}, found {list(box)}, less "
                          "than a pixel: multiply shares of the sides by width and height")  # fmt: skip


# --- tables -----------------------------------------------------------------------------------------------------------


def ready(path: Path) -> list[Path]:
    """What holds a table with types: Parquet files, or a folder that `Dataset.save_to_disk` wrote; none otherwise."""
    if path.suffix == ".parquet" or (path / FOLDER_SAVED).is_file():
        return [path]
    return sorted(path.glob("*.parquet")) if path.is_dir() else []


def saved(paths: Sequence[Path], columns: Mapping[str, str], folder: Path, typed: Collection[str] = COLUMNS
          ) -> Dataset:  # fmt: skip
    """Parquet files, or one folder that `Dataset.save_to_disk` wrote, with the columns' names and types of a task.

    Args:
        paths: the files, in order, or the folder.
        columns: a task's column -> the table's.
        folder: from which paths of pictures go out.
        typed: as of `read`.

    Raises:
        DataError: if it cannot be read, or a column is missing or cannot be given its type.
    """
    from datasets import Dataset, load_from_disk

    path = paths[0]
    try:
        table = Dataset.from_parquet([str(p) for p in paths]) if path.is_file() else load_from_disk(str(path))
    except Exception as error:  # pyarrow and datasets have many kinds of errors for damaged files
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(table, Dataset):
        raise DataError(f"{path}: expected one table, found splits {', '.join(table)}; give the folder of one")
    for name, file in columns.items():
        if file not in table.column_names:
            raise DataError(f"{path}: {unknown('column', file, table.column_names)}")
        if name != file:
            table = table.remove_columns(name) if name in table.column_names else table
            table = table.rename_column(file, name)
    for name in table.column_names:
        if name in COLUMNS and name in typed:
            table = _typed(table, name, path, folder)
    return table


def _typed(table: Dataset, name: str, path: Path, folder: Path) -> Dataset:
    """The table with a column in the type of a task's."""
    from datasets import ClassLabel, Value

    kind, wanted = table.features[name], features([name])[name]
    if name == "video" and isinstance(kind, Value):
        cells: list[Any] = [str(folder / v) if v else None for v in table[name]]
        return table.remove_columns(name).add_column(name, cells, feature=wanted)
    if kind == wanted:
        return table
    if isinstance(kind, ClassLabel):
        names = kind.names
        cells = [None if v is None or v < 0 else names[v] for v in table[name]]
    elif name == "image" and isinstance(kind, Value) and kind.dtype in ("string", "large_string"):
        cells = [_file(folder, v) for v in table[name]]
    elif name == "images" and isinstance(getattr(kind, "feature", None), Value):
        cells = [None if v is None else [_file(folder, path) for path in v] for v in table[name]]
    elif COLUMNS[name] == "[string]" and isinstance(kind, Value):
        cells = [[v] for v in table[name]]  # one caption a row
    else:
        try:
            return table.cast_column(name, wanted)
        except Exception as error:
            raise DataError(f"{path}: expected the column {name!r} to be {wanted}, found {kind} ({error})") from error
    return table.remove_columns(name).add_column(name, cells, feature=wanted)


def _file(folder: Path, path: str | None) -> dict[str, Any] | None:
    return {"path": str(folder / path), "bytes": None} if path else None


def checked(table: Dataset, path: Path, typed: Collection[str], on_error: OnError, find: bool) -> tuple[Dataset, Kept]:
    """The rows of a table that hold what a task needs, and which were left out: their boxes, captions and ids are
    looked at, and whether pictures that are paths are there.

    Args:
        path: its file or folder, for messages.
        typed: columns that a task reads.
        on_error: `stop` at the first fault, or `skip` the row.
        find: look for the pictures.

    Raises:
        DataError: for a row that does not, where it stops; if no row is left.
    """
    from trimtab.data.images import encoded

    kept, rows = Kept(on_error), []
    names = [n for n in (*ONCE, "captions", "box") if n in table.column_names and (n in typed or n in ONCE)]
    columns = {n: table[n] for n in names}
    looked = find and "image" in table.column_names and "image" in typed
    files = paths(table) if looked else [None] * len(table)
    pictures = encoded(table)
    for i in range(len(table)):
        entry = Entry({n: columns[n][i] for n in names}, path, f"row {i}")
        with kept.row():
            if (file := files[i]) is not None and not Path(file).is_file():
                raise entry.error(f"the picture {file!r} is not there")
            if "captions" in columns:
                check_captions(entry, columns["captions"][i])
            if columns.get("box") and columns["box"][i]:
                check_box(entry, columns["box"][i])
                if looked and (cell := pictures[i]["image"]):
                    check_inside(entry, columns["box"][i], size_of(entry, cell))
            for key in (n for n in ONCE if n in columns and columns[n][i] is not None):
                kept.once(entry, columns[key][i], key)
            rows.append(i)
    if not rows:
        raise DataError(f"{path}: holds no rows{f'; {kept.left_out[0]}' if kept.left_out else ''}")
    return table if len(rows) == len(table) else table.select(rows), kept
