"""What every source of data has: its registry, the columns of tables, and the base of readers of published sets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trimtab.data.reading import DataError, Kept, OnError, Pictures
from trimtab.registry import Registry, unknown
from trimtab.settings import within

if TYPE_CHECKING:
    from datasets import Dataset, Features

SOURCES: Registry[type] = Registry("data source")
Split = Literal["train", "validation", "test"]

# Tasks that read tables of one schema; see the tasks themselves for what they do with it.
CAPTIONED = ("retrieval", "matching", "reranking", "captioning", "pretraining")
ASKED = ("vqa", "gqa", "answer-ranking", "answer")
GROUNDED = ("grounding", "box-regression", "set-grounding")

# Columns without which a task cannot use a table; of several groups, one is enough.
NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(CAPTIONED, (("image", "captions"),)),
    **dict.fromkeys(ASKED, (("image", "question", "answer"),)),
    "answer": (("images", "question", "answer"), ("image", "question", "answer"), ("images", "messages")),
    "video-retrieval": (("video", "captions"),), "pairs": (("images", "statement", "label"),),
    "entailment": (("image", "statement", "label"),), **dict.fromkeys(GROUNDED, (("image", "phrase", "box"),)),
    "classification": (("image", "label"),),
}  # fmt: skip
# Further columns that some tasks read where they are there.
READ_TOO: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*ASKED, "answer"), ("answers", "weights", "question_id", "choices", "hint")),
    **dict.fromkeys(GROUNDED, ("tokens_positive",)), "pairs": ("identifier",),
}  # fmt: skip


def read_by(task: str) -> set[str]:
    """The columns that a task reads; empty for an unknown task."""
    return {name for group in NEEDED.get(task, ()) for name in group} | set(READ_TOO.get(task, ()))


# Every column that a reader may give, with its type in a few letters; see `features`.
COLUMNS = {
    "image": "image", "images": "[image]", "image_id": "string", "captions": "[string]", "caption_ids": "[string]",
    "video": "string", "video_id": "string",
    "question": "string", "answer": "string", "answers": "[string]", "weights": "[float32]", "question_id": "string",
    "question_type": "string", "answer_type": "string", "kind": "string", "full_answer": "string",
    "structural": "string", "semantic": "string", "detailed": "string", "group": "string", "entailed": "[string]",
    "balanced": "bool", "steps": "int32",
    "statement": "string", "label": "string", "identifier": "string", "premise": "string", "pair_id": "string",
    "phrase": "string", "box": "[float32]", "ref_id": "string", "ann_id": "string", "tokens_positive": "[[int32]]",
    "choices": "[string]", "hint": "string", "subject": "string", "grade": "string",
}  # fmt: skip


def features(names: Iterable[str]) -> Features:
    """The types of these columns.

    Raises:
        ValueError: for a column that is not in `COLUMNS`.
    """
    from datasets import Features, Image, List, Value

    def kind(text: str) -> Any:
        if text.startswith("["):
            return List(kind(text[1:-1]))
        return Image() if text == "image" else Value(text)

    found = {}
    for name in names:
        if name not in COLUMNS:
            raise ValueError(unknown("column", name, COLUMNS))
        found[name] = kind(COLUMNS[name])
    return Features(found)


@dataclass(frozen=True, kw_only=True)
class Published(ABC):
    """A published data set in a folder, in the layout in which its authors give it.

    A reader names the tasks it serves and its official splits, and gives the rows of one.
    """

    root: Path
    """Folder of the data set, as its authors lay it out."""
    annotations: Path | None = None
    """Folder of the files with the rows, where they are not below `root`."""
    pictures: Path | None = None
    """Folder of the pictures, where it is not one of those below `root` that the authors name."""
    on_error: OnError = "stop"
    """`stop` at the first row that cannot be read, or `skip`: leave it out, count and list what was left out. Pictures
    and videos are then all decoded once, which takes a while."""
    rows: int | None = None
    """At most so many rows of each split, the first ones; None for all."""

    tasks: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[tuple[str, ...]] = ()
    # By which names of files a form is known, {form: patterns}; of a set with one form, under an empty name.
    marks: ClassVar[dict[str, tuple[str, ...]]] = {}
    drop_bad_images: ClassVar[bool] = False  # `on_error: skip` has left them out already
    # How many `answers` or `classes` there are, as published: on it a head's size depends. Read where the data are not
    # there and only costs are asked for (`trimtab.data.assumed`); training takes the names from the files.
    sizes: ClassVar[dict[str, int]] = {}

    def __post_init__(self) -> None:
        within(vars(self), rows="[1, inf)")
        for split in ("train", "validation", "test"):
            names = getattr(self, split, None)
            for name in names if isinstance(names, tuple) else ():  # some sets have a number of rows there
                if name not in self.splits:
                    raise ValueError(f"{self}: {split}: {unknown('split', name, self.splits)}")

    def official(self, split: Split) -> tuple[str, ...]:
        """The official splits of which training, validation or test are made: the settings of these names."""
        names: tuple[str, ...] = getattr(self, split)
        return names

    @property
    def files(self) -> Path:
        """Folder below which the files with the rows are looked for."""
        return Path(self.annotations or self.root)

    @property
    def needs(self) -> Path:
        """The folder without which nothing can be read."""
        return self.files

    def known_count(self, what: str) -> tuple[int | None, str]:
        """How many `answers` or `classes` there are by what is published, and who says so; or None, and what to do."""
        count = self.sizes.get(what)
        return count, "give data.root" if count is None else f"the published number of {self}"

    def find_pictures(self, *folders: str) -> Pictures:
        """The picture files: in the folder that is given, or else in `root` or one of these folders below it."""
        root = Path(self.root)
        places = [Path(self.pictures)] if self.pictures else [root, *(root / folder for folder in folders)]
        return Pictures(*places, decode=self.on_error == "skip")

    @abstractmethod
    def read(self, task: str, name: str, kept: Kept) -> None:
        """Put the rows of an official split, `name`, into `kept`.

        Raises:
            DataError: if a file or row cannot be read.
        """

    def load(self, task: str, split: Split) -> Dataset:
        """The table of a split for a task.

        Raises:
            DataError: if a file or row cannot be read, with both.
            ValueError: if there is no such task or split.
        """
        if split not in ("train", "validation", "test"):
            raise ValueError(f"{self}: {unknown('split', split, ('train', 'validation', 'test'))}")
        return self.table(task, *self.official(split))

    def table(self, task: str, *names: str) -> Dataset:
        """The table of some official splits, one after the other.

        Raises:
            DataError: if a file or row cannot be read, with both.
            ValueError: if there is no such task or official split.
        """
        if task not in self.tasks:
            raise ValueError(f"{self}: {unknown('task', task, self.tasks)}")
        for name in names:
            if name not in self.splits:
                raise ValueError(f"{self}: {unknown('split', name, self.splits)}")
        if not Path(self.root).is_dir():
            raise DataError(f"{self}: {self.root}: there is no such folder")
        kept = Kept(self.on_error)
        for name in dict.fromkeys(names):
            self.read(task, name, kept)
        table = kept.table(f"{self} {'+'.join(names)}")
        return table if self.rows is None else table.select(range(min(self.rows, len(table))))

    def __str__(self) -> str:
        return f"data {getattr(type(self), 'name', type(self).__name__)!r}"
