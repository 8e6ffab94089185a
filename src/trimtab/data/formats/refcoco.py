"""RefCOCO, RefCOCO+ and RefCOCOg: phrases that mean one thing in a COCO picture.

Kazemzadeh et al. 2014, Yu et al. 2016, Mao et al. 2016. Three forms are read: REFER's own (`refs(unc).p` with
`instances.json`), MDETR's (`finetune_refcoco_val.json`), and X-VLM's lists, whose boxes stand in REFER's files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from trimtab.data import pickles
from trimtab.data.base import GROUNDED, SOURCES, Published
from trimtab.data.boxes import Box, clamped, corners
from trimtab.data.reading import DataError, Entry, Ids, Kept, find_file, json_rows

# Below the root; COCO's pictures are found beside REFER's folders or in them.
PICTURES = ("images/mscoco/images/train2014", "images/train2014", "train2014", "mscoco/images/train2014", "images")


@dataclass(frozen=True)
class Expression:
    """A phrase, what it means, and where it stands.

    Attributes:
        picture: name of the picture's file.
        size: its width and height.
        box: corners in pixels; they may stick out of the picture a little.
        written: the box as the file has it: x, y, width, height.
    """

    phrase: str
    picture: str
    size: tuple[int, int]
    box: Box
    written: list[float]
    split: str
    ref_id: int
    ann_id: int
    sent_id: int
    image_id: int
    category: str


@dataclass(frozen=True)
class Instances:
    """`instances.json`: the things in the pictures, by their ids."""

    path: Path
    pictures: Mapping[Any, Entry] = field(repr=False)
    boxes: Mapping[Any, Entry] = field(repr=False)
    categories: Mapping[Any, str] = field(repr=False)

    @classmethod
    def read(cls, path: Path, kept: Kept | None = None) -> Instances:
        """Raises DataError if the file or an entry of it cannot be read, or an id stands twice."""
        kept, ids = Kept() if kept is None else kept, Ids()  # one without rows is false
        found: dict[str, dict[int, Entry]] = {"images": {}, "annotations": {}, "categories": {}}
        for key, entries in found.items():
            for entry in json_rows(path, key):
                with kept.row():
                    ids.once(entry, entry.id("id"), f"id of {key}")
                    entries[entry.number("id")] = entry
        names = {}
        for number, entry in found["categories"].items():
            with kept.row():
                names[number] = entry.text("name")
        return cls(path, found["images"], found["annotations"], names)

    def of(self, entry: Entry, kind: str) -> Entry:
        """The annotation or picture that a ref names.

        Raises:
            RowError: if there is none.
        """
        key = entry.number(f"{kind}_id")
        found = (self.boxes if kind == "ann" else self.pictures).get(key)
        if found is None:
            what = "annotation" if kind == "ann" else "picture"
            raise entry.error(f"its {what} {key} is not in {self.path}")
        return found


def refs(path: Path) -> Iterator[Entry]:
    """The refs of a `refs(<by>).p`, in the file's order.

    Raises:
        PickleRefused: if the pickle asks for a function.
        DataError, ValueError: if it holds no list of refs.
    """
    for i, values in enumerate(pickles.read(path, types=(list,))):
        yield Entry(values, path, f"ref [{i}]")


def belongs(ref_split: str, split: str) -> bool:
    """Whether a ref is in a split, by the rule of REFER's `getRefIds`: `testA` takes every split with an A in its
    name, `test` every one with `test`."""
    if split in ("testA", "testB", "testC"):
        return split[-1] in ref_split
    return "test" in ref_split if split == "test" else ref_split == split


def expressions(entry: Entry, instances: Instances) -> list[Expression]:
    """The phrases of a ref, one each.

    Raises:
        RowError: if a field is missing, the annotation or picture is not in the instances, or the box has no area.
    """
    thing, picture = instances.of(entry, "ann"), instances.of(entry, "image")
    size = (picture.number("width"), picture.number("height"))
    try:
        box = corners(thing, "bbox", size)
    except DataError as error:
        raise entry.error(f"its annotation: {error}") from error
    kind = entry.number("category_id")
    if kind not in instances.categories:
        raise entry.error(f"its category {kind} is not in {instances.path}")
    sentences = entry.inner("sentences")
    if not sentences:
        raise entry.error("expected 'sentences' to hold at least one, found none")
    return [
        Expression(
            s.text("sent"), picture.text("file_name"), size, box, thing.get("bbox"), entry.text("split"),
            entry.number("ref_id"), entry.number("ann_id"), s.number("sent_id"), entry.number("image_id"),
            instances.categories[kind],
        )
        for s in sentences
    ]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A phrase of MDETR's files; `box` is float32, moved into the picture, as MDETR's loader gives it.

    Attributes:
        spans: the characters of the phrase that mean the thing.
    """

    phrase: str
    picture: str
    box: Box
    spans: list[list[int]]
    dataset: str
    number: int
    image_id: int
    ann_id: Any
    area: float


def mdetr(path: Path, kept: Kept) -> Iterator[tuple[Entry, Target]]:
    """The phrases of an MDETR file in its order; a phrase without exactly one box that can be used is an error.

    Raises:
        DataError: if the file or a row of it cannot be read.
    """
    found: dict[Any, list[Entry]] = {}
    for annotation in json_rows(path, "annotations"):
        with kept.row():
            found.setdefault(annotation.number("image_id"), []).append(annotation)
    for entry in json_rows(path, "images"):
        target = None
        with kept.row():
            target = _target(entry, found.get(entry.number("id"), []))
        if target is not None:
            yield entry, target


def _target(entry: Entry, annotations: list[Entry]) -> Target:
    import numpy as np

    if len(annotations) != 1:
        rows = " and ".join(a.row for a in annotations) or "none"
        raise entry.error(f"expected exactly one annotation for the phrase {entry.get('id')}, found {rows}")
    thing, size = annotations[0], (entry.number("width"), entry.number("height"))
    try:
        corners(thing, "bbox", size)  # raises for a box without area
        spans = thing.get("tokens_positive", list)
    except DataError as error:
        raise entry.error(f"its annotation: {error}") from error
    phrase = entry.text("caption")
    if not all(isinstance(s, list) and len(s) == 2 and 0 <= s[0] < s[1] <= len(phrase) for s in spans):
        raise entry.error(f"expected 'tokens_positive' of {thing.row} to be spans of its {len(phrase)} characters, "
                          f"found {spans}")  # fmt: skip
    low, extent = np.asarray(thing.get("bbox"), np.float32).reshape(2, 2)
    box = clamped([float(v) for v in (*low, *(low + extent))], size)
    area = float(np.float32(thing.get("area", (int, float)))) if "area" in thing else float(extent.prod())
    return Target(phrase, entry.text("file_name"), box, spans, str(entry.values.get("dataset_name", "")),
                  entry.number("id"), entry.number("original_id") if "original_id" in entry else entry.number("id"),
                  thing.values.get("original_id", thing.values.get("id")), area)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Referring(Published):
    form: Literal["refer", "mdetr", "xvlm"] = "refer"
    """Whose files: REFER's own, MDETR's `finetune_*.json`, or X-VLM's lists with the boxes of REFER's files. MDETR
    moves boxes into the picture, the others keep them as they are."""
    by: Literal["unc", "umd", "google"] | None = None
    """Whose splits, where the folder holds several `refs(<by>).p`; None takes the only one."""
    train: tuple[str, ...] = ("train",)
    """Official splits to train on."""
    validation: tuple[str, ...] = ("val",)
    """Official splits from which searches draw their rewards."""
    test: tuple[str, ...] = ("testA",)
    """Official splits to evaluate on: testA has people, testB other things."""

    tasks = GROUNDED
    splits = ("train", "val", "test", "testA", "testB")

    @property
    def _set(self) -> str:
        return str(getattr(type(self), "name", ""))

    def _refer(self, kept: Kept | None = None) -> tuple[Path, Instances]:
        """The refs and instances of the set."""
        names = [f"refs({self.by}).p"] if self.by else [f"refs({by}).p" for by in ("unc", "umd", "google")]
        folder = next((f for f in (self.files / self._set, self.files / "data" / self._set)
                       if f.is_dir()), self.files)  # fmt: skip
        path = find_file(folder, *names, depth=1)
        if len(there := [n for n in names if (path.parent / n).is_file()]) > 1:
            raise DataError(f"{path.parent}: found {' and '.join(there)}; name one with data.by")
        return path, Instances.read(find_file(path.parent, "instances.json", depth=0), kept)

    def read(self, task: str, name: str, kept: Kept) -> None:
        if self.form == "mdetr":
            self._read_mdetr(name, kept)
        elif self.form == "xvlm":
            self._read_xvlm(name, kept)
        else:
            path, instances = self._refer(kept)
            pictures = self.find_pictures(*PICTURES)
            for entry in refs(path):
                with kept.row():
                    if not belongs(entry.text("split"), name):
                        continue
                    found = expressions(entry, instances)
                    kept.once(entry, entry.id("ref_id"), "ref_id")
                    for e in found:
                        self._add(kept, e.phrase, e, pictures(entry, e.picture))

    def _add(self, kept: Kept, phrase: str, e: Expression, image: Any) -> None:
        kept.add(image=image, phrase=phrase, box=e.box, ref_id=str(e.ref_id), ann_id=str(e.ann_id),
                 image_id=str(e.image_id))  # fmt: skip

    def _read_mdetr(self, name: str, kept: Kept) -> None:
        pictures = self.find_pictures(*PICTURES)
        for entry, t in mdetr(find_file(self.files, f"finetune_{self._set}_{name}.json"), kept):
            with kept.row():
                kept.add(
                    image=pictures(entry, t.picture), phrase=t.phrase, box=t.box,
                    ref_id=kept.once(entry, str(t.number)), ann_id=str(t.ann_id), image_id=str(t.image_id),
                    tokens_positive=t.spans,
                )  # fmt: skip

    def _read_xvlm(self, name: str, kept: Kept) -> None:
        path, instances = self._refer(kept)
        of: dict[int, Entry] = {}
        for listed in refs(path):
            with kept.row():
                of[listed.number("ref_id")] = listed
        pictures = self.find_pictures(*PICTURES)
        for entry in json_rows(find_file(self.files, f"{self._set}_{name}.json")):
            with kept.row():
                if (ref := of.get(entry.number("ref_id"))) is None:
                    raise entry.error(f"its ref {entry.get('ref_id')} is not in {path}")
                e = expressions(ref, instances)[0]
                self._add(kept, entry.text("text"), e, pictures(entry, e.picture))


@SOURCES.register("refcoco")
@dataclass(frozen=True, kw_only=True)
class RefCOCO(_Referring):
    """RefCOCO (Kazemzadeh et al. 2014): phrases that people gave each other in a game."""

    marks: ClassVar[dict[str, tuple[str, ...]]] = {
        "refer": ("*/refcoco/refs(*).p",), "mdetr": ("finetune_refcoco_*.json",), "xvlm": ("refcoco_*.json",),
    }  # fmt: skip


@SOURCES.register("refcoco+")
@dataclass(frozen=True, kw_only=True)
class RefCOCOPlus(_Referring):
    """RefCOCO+: as RefCOCO, without words for places."""

    marks: ClassVar[dict[str, tuple[str, ...]]] = {
        "refer": ("*/refcoco+/refs(*).p",), "mdetr": ("finetune_refcoco+_*.json",), "xvlm": ("refcoco+_*.json",),
    }  # fmt: skip


@SOURCES.register("refcocog")
@dataclass(frozen=True, kw_only=True)
class RefCOCOg(_Referring):
    """RefCOCOg (Mao et al. 2016): longer phrases; the splits of `umd` have no picture in two of them."""

    marks: ClassVar[dict[str, tuple[str, ...]]] = {
        "refer": ("*/refcocog/refs(*).p",), "mdetr": ("finetune_refcocog_*.json",), "xvlm": ("refcocog_*.json",),
    }  # fmt: skip

    test: tuple[str, ...] = ("test",)
    """Official splits to evaluate on."""
