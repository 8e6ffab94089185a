"""Oxford Flowers-102 (Nilsback and Zisserman 2008): its `.mat` files, or MULTIFLOW's csv."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from trimtab.data.base import SOURCES, Published
from trimtab.data.reading import DataError, Entry, Kept, csv_rows, find_file

LISTS = {"train": "trnid", "val": "valid", "test": "tstid"}

# The files hold numbers only. These are the names of the classes 1 to 102 as torchvision and others give them.
NAMES = [
    "pink primrose",
    "hard-leaved pocket orchid",
    "canterbury bells",
    "sweet pea",
    "english marigold",
    "tiger lily",
    "moon orchid",
    "bird of paradise",
    "monkshood",
    "globe thistle",
    "snapdragon",
    "colt's foot",
    "king protea",
    "spear thistle",
    "yellow iris",
    "globe-flower",
    "purple coneflower",
    "peruvian lily",
    "balloon flower",
    "giant white arum lily",
    "fire lily",
    "pincushion flower",
    "fritillary",
    "red ginger",
    "grape hyacinth",
    "corn poppy",
    "prince of wales feathers",
    "stemless gentian",
    "artichoke",
    "sweet william",
    "carnation",
    "garden phlox",
    "love in the mist",
    "mexican aster",
    "alpine sea holly",
    "ruby-lipped cattleya",
    "cape flower",
    "great masterwort",
    "siam tulip",
    "lenten rose",
    "barbeton daisy",
    "daffodil",
    "sword lily",
    "poinsettia",
    "bolero deep blue",
    "wallflower",
    "marigold",
    "buttercup",
    "oxeye daisy",
    "common dandelion",
    "petunia",
    "wild pansy",
    "primula",
    "sunflower",
    "pelargonium",
    "bishop of llandaff",
    "gaura",
    "geranium",
    "orange dahlia",
    "pink-yellow dahlia",
    "cautleya spicata",
    "japanese anemone",
    "black-eyed susan",
    "silverbush",
    "californian poppy",
    "osteospermum",
    "spring crocus",
    "bearded iris",
    "windflower",
    "tree poppy",
    "gazania",
    "azalea",
    "water lily",
    "rose",
    "thorn apple",
    "morning glory",
    "passion flower",
    "lotus",
    "toad lily",
    "anthurium",
    "frangipani",
    "clematis",
    "hibiscus",
    "columbine",
    "desert-rose",
    "tree mallow",
    "magnolia",
    "cyclamen",
    "watercress",
    "canna lily",
    "hippeastrum",
    "bee balm",
    "ball moss",
    "foxglove",
    "bougainvillea",
    "camellia",
    "mallow",
    "mexican petunia",
    "bromelia",
    "blanket flower",
    "trumpet creeper",
    "blackberry lily",
]


def matrix(path: Path, name: str) -> list[int]:
    """The whole numbers of a variable of a MAT-file (version 5, packed or not), as one list.

    Raises:
        ImportError: if scipy is not installed.
        DataError: if the file cannot be read or does not hold them.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("reading .mat files needs scipy: pip install scipy") from error
    import numpy as np

    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        found = loadmat(path)
    except Exception as error:  # scipy lets many kinds of errors through for damaged files
        raise DataError(f"{path}: cannot be read as a MAT-file ({type(error).__name__}: {error})") from error
    if name not in found:
        there = ", ".join(repr(k) for k in found if not k.startswith("__"))
        raise DataError(f"{path}: expected the variable {name!r}, found {there or 'none'}")
    values = np.ravel(found[name])
    if not np.issubdtype(values.dtype, np.number) or not (values == np.trunc(values)).all():
        raise DataError(f"{path}: expected {name!r} to hold whole numbers, found {values.dtype}")
    return [int(v) for v in values]


def numbered(set_ids: Path, labels: Path, split: str, kept: Kept) -> Iterator[tuple[Entry, str, int]]:
    """(name of the picture, class number from 0) in the order of a split's list.

    Raises:
        DataError: if a file cannot be read, or a picture's number or class does not exist.
    """
    classes, name = matrix(labels, "labels"), LISTS[split]
    for i, number in enumerate(matrix(set_ids, name)):
        entry, row = Entry({}, set_ids, f"{name}[{i}]"), None
        with kept.row():
            if not 1 <= number <= len(classes):
                raise entry.error(f"expected a picture's number from 1 to {len(classes)} (the labels of {labels}), "
                                  f"found {number}")  # fmt: skip
            kept.once(entry, str(number), "picture")
            label = classes[number - 1]
            if not 1 <= label <= len(NAMES):
                raise Entry({}, labels, f"labels[{number - 1}]").error(f"expected a class from 1 to 102, found {label}")
            row = entry, f"image_{number:05d}.jpg", label - 1
        if row is not None:
            yield row


def listed(folder: Path, split: str, kept: Kept) -> Iterator[tuple[Entry, str, int, str]]:
    """(name of the picture, class number, class) of a split in MULTIFLOW's `split.csv`, numbered by its `metadata.csv`.

    Raises:
        DataError: if a file or row cannot be read, or a class has no number.
    """
    numbers = class_numbers(folder / "metadata.csv")
    for entry in csv_rows(folder / "split.csv", ["filename", "class", "split"]):
        row = None
        with kept.row():
            if entry.one_of("split", LISTS) != split:
                continue
            kept.once(entry, entry.text("filename"), "picture")
            if (name := entry.text("class")) not in numbers:
                raise entry.error(f"the class {name!r} is not in {folder / 'metadata.csv'}")
            row = entry, entry.text("filename"), numbers[name], name
        if row is not None:
            yield row


def class_numbers(path: Path) -> dict[str, int]:
    """Class -> its number, of MULTIFLOW's `metadata.csv`."""
    found: dict[str, int] = {}
    for entry in csv_rows(path, ["idx", "class_name"]):
        if not entry.text("idx").strip().isdecimal():
            raise entry.error(f"expected 'idx' to be a whole number, found {entry.get('idx')!r}")
        found[entry.text("class_name")] = int(entry.text("idx"))
    return found


@SOURCES.register("flowers102")
@dataclass(frozen=True, kw_only=True)
class Flowers102(Published):
    """Flowers-102: 1,020 / 1,020 / 6,149 pictures of 102 kinds of flowers."""

    form: Literal["mat", "csv"] = "mat"
    """The authors' `setid.mat` and `imagelabels.mat`, or MULTIFLOW's `annots/split.csv`, which numbers the classes in
    another way."""
    train: tuple[str, ...] = ("train",)
    """Official splits to train on; many papers, and MULTIFLOW, take train and val."""
    validation: tuple[str, ...] = ("val",)
    """Official splits from which searches draw their rewards."""
    test: tuple[str, ...] = ("test",)
    """Official splits to evaluate on."""

    tasks = ("classification",)
    splits = ("train", "val", "test")
    marks: ClassVar[dict[str, tuple[str, ...]]] = {"mat": ("setid.mat",), "csv": ("split.csv",)}
    sizes: ClassVar[dict[str, int]] = {"classes": len(NAMES)}

    def classes(self) -> Sequence[str]:
        """The names of all classes, in the order of their numbers."""
        if self.form == "mat":
            return NAMES
        numbers = class_numbers(find_file(self.files, "metadata.csv"))
        return sorted(numbers, key=numbers.__getitem__)

    def read(self, task: str, name: str, kept: Kept) -> None:
        pictures = self.find_pictures("jpg", "flowers-102/jpg", "images")
        found: Any
        if self.form == "mat":
            files = find_file(self.files, "setid.mat"), find_file(self.files, "imagelabels.mat")
            found = ((e, picture, NAMES[n]) for e, picture, n in numbered(*files, name, kept))
        else:
            found = (
                (e, picture, c) for e, picture, _, c in listed(find_file(self.files, "split.csv").parent, name, kept)
            )
        for entry, picture, label in found:
            with kept.row():
                kept.add(image=pictures(entry, picture), label=label, image_id=Path(picture).stem)
