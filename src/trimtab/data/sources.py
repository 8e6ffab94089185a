"""Where a recipe's rows come from: each source gives train, validation and test tables of a task's schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trimtab.data import formats  # noqa: F401 (fills SOURCES)
from trimtab.data.base import SOURCES
from trimtab.data.formats.users import Files
from trimtab.registry import unknown
from trimtab.settings import within

if TYPE_CHECKING:
    from datasets import Dataset


__all__ = ["SOURCES", "EasyVQA", "Files", "Pictograms"]


@SOURCES.register("pictograms")
@dataclass(frozen=True)
class Pictograms:
    """The built-in world (`trimtab.data.pictograms`)."""

    style: Literal["twemoji", "openmoji", "twemoji-varied", "illustrators-varied"] = "openmoji"
    """Whose drawings: our small models are pretrained on `twemoji`, plain and redrawn, and on further illustrators';
    `openmoji` is new to them."""
    train: int = 2000
    """Rows to train on."""
    test: int = 500
    """Rows to evaluate on."""
    validation: int = 500
    """Rows from which searches draw their rewards."""
    split: Literal["test", "unseen-concepts", "unseen-combinations"] = "test"
    """Which scenes to evaluate on."""
    seed: int = 0
    """Seed of the scenes, apart from the recipe's: every method sees the same rows."""
    size: int = 64
    """Side of the pictures in pixels."""
    per_scene: int = 2
    """At most this many rows of one scene."""
    count: int = 240
    """Concepts in the world."""
    questions: tuple[str, ...] | None = None
    """Kinds of question in a VQA task, such as `is there`; None for all of them."""
    drop_bad_images: bool = False
    """Leave out images that cannot be decoded instead of stopping."""

    programs: bool = False
    """Compositional questions with programs, as in GQA, in a VQA task."""
    label: Literal["category", "name"] = "category"
    """What a classification tells: one of five Unicode categories, or the name of the thing."""

    def __post_init__(self) -> None:
        within(vars(self), train="[1, inf)", test="[1, inf)", validation="[1, inf)")

    tasks = {
        "retrieval": "retrieval", "matching": "retrieval", "captioning": "retrieval",
        "pretraining": "retrieval", "vqa": "vqa", "grounding": "grounding", "answer": "vqa", "gqa": "programs",
        "pairs": "pairs", "entailment": "entailment", "classification": "groups", "video-retrieval": "video",
    }  # fmt: skip

    def load(self, task: str, split: Literal["train", "validation", "test"]) -> Dataset:
        """The table of a split for a task; made once, then read from the cache folder."""
        from trimtab.data import pictograms

        if task not in self.tasks:
            raise ValueError(f"data 'pictograms': {unknown('task', task, self.tasks)}")
        kind = "programs" if self.programs and task in ("vqa", "answer") else self.tasks[task]
        if kind == "programs" and not self.programs:
            raise ValueError(f"data 'pictograms': task {task!r} asks questions with programs: set `programs: true`")
        name = self.split if split == "test" else split
        table = pictograms.load(kind, self.style, name, getattr(self, split), self.seed, self.size, self.per_scene,
                                self.count, self.questions)  # fmt: skip
        if task == "classification" and self.label == "name":
            return table.remove_columns("label").rename_column("name", "label")
        return table

    def answers(self) -> Sequence[str]:
        """The classes of a VQA task on this source."""
        from trimtab.data import pictograms

        return [*pictograms.answers(self.count), *(pictograms.programs.ANSWERS if self.programs else ())]

    def classes(self) -> Sequence[str]:
        """The classes of a classification task on this source."""
        from trimtab.data.pictograms.concepts import concepts

        return sorted({c.name if self.label == "name" else c.category for c in concepts(self.count)})


@SOURCES.register("easy-vqa")
@dataclass(frozen=True)
class EasyVQA:
    """easy-VQA (Victor Zhou, MIT licence, from PyPI): 5,000 pictures of one coloured shape, 48,248 questions."""

    train: int | None = None
    """Rows to train on, the first of a fixed random order; None for all that validation leaves."""
    test: int | None = None
    """Rows of the published test split; None for all 9,673."""
    validation: int = 500
    """Rows taken from the end of the published training split's random order."""
    seed: int = 0
    """Seed of that order."""
    drop_bad_images: bool = False
    """Leave out images that cannot be decoded instead of stopping."""

    def __post_init__(self) -> None:
        within(vars(self), train="[1, inf)", test="[1, inf)", validation="[0, inf)", seed="[0, inf)")

    def load(self, task: str, split: Literal["train", "validation", "test"]) -> Dataset:
        """Columns `image`, `question`, `answer`.

        Raises:
            ImportError: if the package `easy-vqa` (extra `world`) is not installed.
            ValueError: for a task other than `vqa`, or if `validation` leaves no row to train on.
        """
        if task != "vqa":
            raise ValueError(f"data 'easy-vqa': {unknown('task', task, ['vqa'])}")
        package = _easy_vqa()
        published = "test" if split == "test" else "train"
        questions, answers, images = getattr(package, f"get_{published}_questions")()
        paths = getattr(package, f"get_{published}_image_paths")()
        import numpy as np
        from datasets import Dataset, Features, Image, Value

        order = np.random.default_rng(self.seed).permutation(len(questions))
        if published == "train" and self.validation >= len(order):
            raise ValueError(f"data 'easy-vqa': validation: expected fewer than the {len(order)} published training "
                             f"rows, found {self.validation}")  # fmt: skip
        chosen = order[: self.test] if split == "test" else self._rows(order.tolist(), images, split)
        rows = {
            "image": [{"path": paths[images[i]], "bytes": None} for i in chosen],
            "question": [questions[i] for i in chosen],
            "answer": [answers[i] for i in chosen],
        }
        schema = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
        return Dataset.from_dict(rows, features=schema)

    def _rows(self, order: Sequence[int], images: Sequence[int], split: str) -> list[int]:
        """The training or validation rows, in their order. Ten questions are about each picture, and no picture is on
        both sides."""
        cut = len(order) - self.validation
        if self.train is None:
            held = {images[i] for i in order[cut:]}
            return list(order[cut:]) if split == "validation" else [i for i in order[:cut] if images[i] not in held]
        trained = order[:cut][: self.train]
        if split == "train":
            return list(trained)
        known = {images[i] for i in trained}
        rest = [i for i in order[len(trained) :] if images[i] not in known]
        if len(rest) < self.validation:
            raise ValueError(f"data 'easy-vqa': validation: expected {self.validation}, there are {len(rest)} rows of "
                             f"other pictures than the {self.train} to train on: lower one of the two")  # fmt: skip
        return rest[len(rest) - self.validation :]

    def answers(self) -> Sequence[str]:
        """The 13 answers of the set."""
        return sorted(_easy_vqa().get_answers())


def _easy_vqa():
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(
            "the easy-VQA data need their package: pip install -e '.[world]' in trimtab's folder"
        ) from error
    return easy_vqa
