"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): pictures of 32 x 32 pixels in Python 2's pickles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from trimtab.data import pickles
from trimtab.data.base import SOURCES
from trimtab.data.held_out import HeldOut
from trimtab.data.reading import DataError, Entry, Kept, find_file

SIDE = 32


def batch(path: Path, labels: str) -> Iterator[tuple[Entry, Any, dict[str, int]]]:
    """The pictures of a batch file, each as an array (32, 32, 3) of uint8, with its label numbers by column.

    Args:
        labels: column of labels that must be there.

    Raises:
        PickleRefused: if the pickle asks for a function that no array needs.
        DataError: if pictures are not rows of 3,072 bytes, or labels are not as many as pictures.
    """
    import numpy as np

    file = Entry(_texts(pickles.read(path, arrays=True, encoding="latin1", types=(dict,))), path, "the batch")
    data = file.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * SIDE**2:
        what = f"an array {data.shape} of {data.dtype}" if isinstance(data, np.ndarray) else f"a {type(data).__name__}"
        raise file.error(f"expected 'data' to be rows of {3 * SIDE**2} bytes (three planes of 32 x 32), found {what}"
                         + _first_row(data))  # fmt: skip
    columns = {name: file.get(name, list) for name in (labels, "coarse_labels") if name == labels or name in file}
    for name, numbers in columns.items():
        if len(numbers) != len(data):
            row = min(len(numbers), len(data))
            raise DataError(f"{path}, row [{row}]: expected a label in {name!r} for each of {len(data)} pictures, "
                            f"found {len(numbers)}")  # fmt: skip
    pictures = data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)  # planes -> pixels of red, green, blue
    for i, picture in enumerate(pictures):
        yield Entry({}, path, f"row [{i}]"), picture, {name: numbers[i] for name, numbers in columns.items()}


def _first_row(data: Any) -> str:
    return f"; row [0] has {data.shape[1]}" if getattr(data, "ndim", 0) == 2 else ""


def _texts(found: dict[Any, Any]) -> dict[str, Any]:
    """The same with keys as strings: other programs read and write them as bytes."""
    return {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in found.items()}


def names(path: Path, column: str) -> list[str]:
    """The names of classes in a meta file.

    Raises:
        DataError: if the column is missing or its names are not strings that differ.
    """
    file = Entry(_texts(pickles.read(path, arrays=True, encoding="latin1", types=(dict,))), path, "the names")
    found = [n.decode() if isinstance(n, bytes) else n for n in file.get(column, list)]
    if not found or not all(isinstance(n, str) for n in found) or len(set(found)) != len(found):
        raise file.error(f"expected {column!r} to be names of classes, each once, found {found[:5]}")
    return found


def picture_cell(pixels: Any) -> dict[str, Any]:
    """An array (H, W, 3) of uint8 as a cell of a picture column; PPM, because it is written without being packed."""
    head = f"P6\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode()
    return {"path": None, "bytes": head + pixels.tobytes()}


@dataclass(frozen=True, kw_only=True)
class _Cifar(HeldOut):
    validation: int = 5000
    """Pictures taken from the end of the training split: searches draw their rewards from them."""

    tasks = ("classification",)
    splits = ("train", "test")
    batches: ClassVar[dict[str, tuple[str, ...]]] = {"train": ("train",), "test": ("test",)}
    meta = "meta"

    def _columns(self) -> tuple[str, str]:
        """Columns of the label's number and of its name."""
        return "labels", "label_names"

    def classes(self) -> Sequence[str]:
        """The names of all classes, in the order of their numbers."""
        return names(find_file(self.files, self.meta), self._columns()[1])

    def read(self, task: str, name: str, kept: Kept) -> None:
        column, classes = self._columns()[0], self.classes()
        for file in self.batches[name]:
            path = find_file(self.files, file)
            for entry, pixels, labels in batch(path, column):
                with kept.row():
                    number = labels[column]
                    if not isinstance(number, int) or not 0 <= number < len(classes):
                        raise entry.error(f"expected a label from 0 to {len(classes) - 1}, found {number!r}")
                    kept.add(image=picture_cell(pixels), label=classes[number], image_id=f"{file}-{entry.row[5:-1]}")


@SOURCES.register("cifar10")
@dataclass(frozen=True, kw_only=True)
class CIFAR10(_Cifar):
    """CIFAR-10: 50,000 + 10,000 pictures of ten classes (the Python version)."""

    marks: ClassVar[dict[str, tuple[str, ...]]] = {"": ("batches.meta",)}
    sizes: ClassVar[dict[str, int]] = {"classes": 10}

    batches: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test": ("test_batch",),
    }
    meta = "batches.meta"


@SOURCES.register("cifar100")
@dataclass(frozen=True, kw_only=True)
class CIFAR100(_Cifar):
    """CIFAR-100: 50,000 + 10,000 pictures of a hundred classes in twenty groups (the Python version)."""

    marks: ClassVar[dict[str, tuple[str, ...]]] = {"": ("*/cifar-100-python/meta",)}

    labels: Literal["fine", "coarse"] = "fine"
    """The hundred classes, or their twenty groups."""

    def known_count(self, what: str) -> tuple[int | None, str]:
        return (100 if self.labels == "fine" else 20) if what == "classes" else None, f"the published number of {self}"

    def _columns(self) -> tuple[str, str]:
        return f"{self.labels}_labels", f"{self.labels}_label_names"
