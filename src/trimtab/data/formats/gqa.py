"""GQA in its official files, LXMERT's lists, or MDETR's COCO-like files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from trimtab.data.base import ASKED, SOURCES, Published
from trimtab.data.formats.vqav2 import answer_list
from trimtab.data.reading import DataError, Entry, Kept, NotThere, find_file, json_rows, json_table, look_for

LXMERT = {"train_balanced": "train", "val_balanced": "valid", "testdev_balanced": "testdev", "test_balanced": "test",
          "challenge_balanced": "challenge"}  # fmt: skip
TYPES = ("obj", "attr", "rel", "global", "cat")
UNTOLD = ("test", "challenge", "submission")  # splits without answers


@SOURCES.register("gqa")
@dataclass(frozen=True, kw_only=True)
class GQA(Published):
    """GQA (Hudson and Manning, CVPR 2019): questions made from scene graphs; 943,000 / 132,062 / 12,578 questions of
    balanced train / val / testdev.

    Tables have `image`, `image_id`, `question`, `question_id` (a string: leading zeros count), `answer`,
    `full_answer`, `structural`, `semantic`, `detailed`, `group`, `entailed`, `balanced`, `steps`; what a form does not
    tell is empty. `answers()` is LXMERT's list of 1,842 where `trainval_label2ans.json` is there, else every answer of
    balanced train and val in the order in which they are first met.
    """

    form: Literal["official", "lxmert", "mdetr"] = "official"
    """Form of the files: the official questions, LXMERT's `train.json`, or MDETR's `finetune_gqa_*.json`."""
    train: tuple[str, ...] = ("train_balanced",)
    """Official splits to train on; LXMERT: train_balanced and val_balanced."""
    validation: tuple[str, ...] = ("val_balanced",)
    """Official splits from which searches draw their rewards."""
    test: tuple[str, ...] = ("testdev_balanced",)
    """Official splits to evaluate on; `test` and `challenge` have no answers."""
    answer_list: Path | None = None
    """JSON file of the vocabulary: a list, or an object from answers to numbers."""

    tasks: ClassVar[tuple[str, ...]] = ASKED
    splits: ClassVar[tuple[str, ...]] = tuple(
        f"{part}_{kind}" for part in ("train", "val", "testdev", *UNTOLD) for kind in ("balanced", "all")
    )
    marks: ClassVar[dict[str, tuple[str, ...]]] = {
        "official": ("*_balanced_questions.json", "*_all_questions*.json"), "mdetr": ("finetune_gqa_*.json",),
    }  # fmt: skip
    sizes: ClassVar[dict[str, int]] = {"answers": 1842}  # LXMERT's list, of which CLIP-ViL and UniPT make classes

    def read(self, task: str, name: str, kept: Kept) -> None:
        for path in self._files(name):
            self.read_file(path, name, kept)

    def read_file(self, path: Path, name: str, kept: Kept) -> None:
        """Put the questions of a file of one of the forms into `kept`.

        Raises:
            DataError: if the file or a row cannot be read.
        """
        pictures = self.find_pictures("images", "gqa/images", "allImages/images")
        row = {"official": _official, "lxmert": _lxmert, "mdetr": _mdetr}[self.form]
        for entry, number in self._entries(path):
            with kept.row():
                number = number if number is not None else _id(entry)
                columns = row(entry)
                if not columns["answer"] and name.partition("_")[0] not in UNTOLD:
                    raise entry.error(f"the question {number!r} has no answer")
                image = columns["image_id"]
                kept.add(image=pictures(entry, f"{image}.jpg"), question_id=kept.once(entry, number, "question_id"),
                         **columns)  # fmt: skip

    def answers(self) -> Sequence[str]:
        """The vocabulary, in the order of its classes.

        Raises:
            DataError: if a file of it cannot be read.
        """
        if self.answer_list is not None:
            return answer_list(Path(self.answer_list))
        if (listed := look_for(self.files, "trainval_label2ans.json")) is not None:
            return answer_list(listed)
        row = {"official": _official, "lxmert": _lxmert, "mdetr": _mdetr}[self.form]
        entries = (e for name in ("train_balanced", "val_balanced") for p in self._files(name)
                   for e, _ in self._entries(p))  # fmt: skip
        return list(dict.fromkeys(row(entry)["answer"] for entry in entries))

    def _files(self, name: str) -> list[Path]:
        """The files of a split: one, or chunks in the order of their numbers."""
        if self.form == "lxmert":
            if name not in LXMERT:
                raise NotThere(f"{self}: LXMERT's files have no split {name!r}; they have {', '.join(LXMERT)}")
            return [find_file(self.files, f"{LXMERT[name]}.json")]
        if self.form == "mdetr":
            return [find_file(self.files, f"finetune_gqa_{name}.json")]
        first = find_file(self.files, f"{name}_questions.json", f"{name}_questions_0.json")
        if first.name == f"{name}_questions.json":
            return [first]
        chunks = {int(p.stem.rpartition("_")[2]): p for p in first.parent.glob(f"{name}_questions_*.json")
                  if p.stem.rpartition("_")[2].isdigit()}  # fmt: skip
        if missing := sorted(set(range(max(chunks) + 1)) - set(chunks)):
            raise DataError(f"{first.parent}: expected the chunk {name}_questions_{missing[0]}.json, found none")
        return [chunks[i] for i in sorted(chunks)]

    def _entries(self, path: Path) -> Iterator[tuple[Entry, str | None]]:
        """The questions of a file, each with its id where that stands outside it."""
        if self.form == "official":
            yield from ((entry, number) for number, entry in json_table(path))
        else:
            yield from ((entry, None) for entry in json_rows(path, "images" if self.form == "mdetr" else None))


def _id(entry: Entry) -> str:
    """The id of a question; a number would have lost its leading zeros."""
    return entry.text("questionId" if "questionId" in entry else "question_id")


def _columns(**told: Any) -> dict[str, Any]:
    """All columns but picture and id; those not told are empty."""
    return {"full_answer": "", "structural": "", "semantic": "", "detailed": "", "group": "", "entailed": [],
            "balanced": True, "steps": 0, **told}  # fmt: skip


def _official(entry: Entry) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if "types" in entry:
        types = entry.part("types")
        told = {
            kind: types.text(kind, empty=True) for kind in ("structural", "semantic", "detailed") if types.get(kind)
        }
    if "groups" in entry:
        told["group"] = entry.part("groups").values.get("global") or ""
    if "entailed" in entry:
        told["entailed"] = entry.texts("entailed") if entry.get("entailed", list) else []
    if "semantic" in entry:
        from trimtab.metrics.gqa import steps

        program = [{k: step.text(k, empty=True) for k in ("operation", "argument")} for step in entry.inner("semantic")]
        told["steps"] = steps({"semantic": program})
    return _columns(
        image_id=entry.id("imageId"), question=entry.text("question"), balanced=entry.get("isBalanced", bool),
        answer=entry.text("answer") if "answer" in entry else "",
        full_answer=entry.text("fullAnswer", empty=True) if "fullAnswer" in entry else "",
        **told,
    )  # fmt: skip


def _lxmert(entry: Entry) -> dict[str, Any]:
    label = entry.part("label").values if "label" in entry else {}
    if not all(isinstance(score, (int, float)) for score in label.values()):
        raise entry.error(f"expected 'label' to be an object from answers to scores, found {label!r}")
    answer = max(label, key=lambda a: label[a]) if label else ""
    return _columns(image_id=entry.id("img_id"), question=entry.text("sent"), answer=answer)


def _mdetr(entry: Entry) -> dict[str, Any]:
    return _columns(image_id=Path(entry.text("file_name")).stem, question=entry.text("caption"),
                    answer=entry.text("answer") if "answer" in entry else "",
                    semantic=entry.one_of("question_type", TYPES))  # fmt: skip
