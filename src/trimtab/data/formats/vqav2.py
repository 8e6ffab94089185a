"""VQA v2 in its official files, or in the JSON lists of X-VLM, BLIP and multiflow; with Visual Genome's questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from trimtab.data import wording
from trimtab.data.base import ASKED, SOURCES, Published, Split
from trimtab.data.reading import (
    DataError,
    Entry,
    Ids,
    Kept,
    NotThere,
    OnError,
    Pictures,
    find_file,
    json_rows,
    read_json,
)

if TYPE_CHECKING:
    from datasets import Dataset

FOLDERS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test2015"}
REST = 1000  # pictures of the validation split that ViLT does not train on


@SOURCES.register("vqav2")
@dataclass(frozen=True, kw_only=True)
class VQAv2(Published):
    """VQA v2 (Goyal et al., CVPR 2017): 443,757 / 214,354 questions of train / val, 447,793 of test.

    Tables have `image`, `image_id`, `question`, `question_id`, `answer` (the most common one), `answers` (all ten as
    written; none in test), `weights` (what each counts: a tenth), `question_type`, `answer_type`. In `vg` there is one
    answer. `answers()` is the vocabulary by the published rule: the normalised most common answers that at least nine
    questions of train and val have, 3,129 on the real data, in the order in which they are first met. A checkpoint has
    an order of its own: give its list as `answer_list`.
    """

    form: Literal["official", "xvlm"] = "official"
    """Form of the files: the official questions and annotations, or X-VLM's, BLIP's and multiflow's JSON lists."""
    train: tuple[str, ...] = ("train",)
    """Official splits to train on. X-VLM and BLIP: train, val, vg. ViLT and METER: train, trainable-val."""
    validation: tuple[str, ...] = ("val",)
    """Official splits from which searches draw their rewards."""
    test: tuple[str, ...] = ("val",)
    """Official splits to evaluate on; `test-dev` and `test` have no answers, their results go to the server."""
    outside: Literal["drop", "keep", "stop"] = "drop"
    """Training questions of train and val none of whose answers is in the vocabulary: left out as ViLT does, kept, or
    an error. In evaluation all are kept, as the official numbers have them."""
    answer_list: Path | None = None
    """JSON file of the vocabulary: a list, or an object from answers to numbers. None: in the form `xvlm` the list
    `answer_list.json`, else the published rule."""
    vg_weight: float = 0.5
    """What the one answer of a Visual Genome question counts: 0.5 in X-VLM and multiflow, 0.2 in BLIP."""
    vg_pictures: Path | None = None
    """Folder of Visual Genome's pictures; None looks below `root`."""
    wording: Literal["as written", "xvlm", "blip"] = "as written"
    """How questions are prepared: not at all, or as the authors' code does (`trimtab.data.wording`)."""
    max_words: int = 30
    """Questions are cut to so many words in the wordings `xvlm` and `blip`."""

    tasks: ClassVar[tuple[str, ...]] = ASKED
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test", "test-dev", "vg", "trainable-val", "rest-val")
    marks: ClassVar[dict[str, tuple[str, ...]]] = {
        "official": ("v2_OpenEnded_mscoco_*.json",), "xvlm": ("vqa_train.json", "vqa_val.json"),
    }  # fmt: skip
    sizes: ClassVar[dict[str, int]] = {"answers": 3129}  # Teney et al., CVPR 2018, section 3.2; ViLT, METER, LXMERT

    def load(self, task: str, split: Split) -> Dataset:
        keeps = split != "train" and self.outside != "keep"
        return super(VQAv2, replace(self, outside="keep") if keeps else self).load(task, split)

    def read(self, task: str, name: str, kept: Kept) -> None:
        if self.form == "xvlm":
            self._lists(name, kept)
        elif name == "vg":
            self.read_genome(find_file(self.files, "question_answers.json"), kept)
        else:
            questions, annotations = self._official(name)
            self.read_file(questions, annotations, name, kept)

    def answers(self) -> Sequence[str]:
        """The vocabulary, in the order of its classes.

        Raises:
            DataError: if a file of it cannot be read.
        """
        if self.answer_list is not None:
            return answer_list(Path(self.answer_list))
        if self.form == "xvlm":
            return answer_list(find_file(self.files, "answer_list.json"))
        annotations = [path for name in ("train", "val") if (path := self._official(name)[1])]
        return _vocabulary(tuple((path, path.stat().st_mtime_ns) for path in annotations), self.on_error)

    def _official(self, name: str) -> tuple[Path, Path | None]:
        """The files of a split's questions and annotations; there are none of test."""
        part = "val" if name.endswith("-val") else name
        folder = {"test-dev": "test-dev2015"}.get(part, FOLDERS[part])
        questions = find_file(self.files, f"v2_OpenEnded_mscoco_{folder}_questions.json")
        if part.startswith("test"):
            return questions, None
        return questions, find_file(self.files, f"v2_mscoco_{folder}_annotations.json")

    # --- official files -----------------------------------------------------------------------------------------------

    def read_file(self, questions: Path, annotations: Path | None, name: str, kept: Kept) -> None:
        """Put the questions of a split into `kept`, joined with their annotations by id.

        Raises:
            DataError: if a file or row cannot be read.
        """
        part = "val" if name.endswith("-val") else name
        pictures = self.find_pictures("images", "coco", "mscoco")
        told = {} if annotations is None else _by_id(annotations, "annotations", kept)
        known = self._known(name)
        rest = _last_pictures(annotations, REST) if name.endswith("-val") and annotations else set()
        ids = Ids()
        for entry in json_rows(questions, "questions"):
            with kept.row():
                number, image = ids.once(entry, entry.id("question_id"), "question_id"), entry.number("image_id")
                row = told.pop(number, None)
                if annotations is not None and row is None:
                    raise entry.error(f"the question {number!r} has no annotation in {annotations.name}")
                if name.endswith("-val") and (str(image) in rest) != (name == "rest-val"):
                    continue
                answers = [] if row is None else _ten(row)
                common = "" if row is None else row.text("multiple_choice_answer", empty=True)
                if row is not None and not self._inside(row, answers, known):
                    continue
                file = f"{FOLDERS[part]}/COCO_{FOLDERS[part]}_{image:012d}.jpg"
                kept.add(
                    image=pictures(entry, file), image_id=str(image), question=self._asked(entry), question_id=number,
                    answer=common, answers=answers,
                    weights=[1 / len(answers) for _ in answers],
                    question_type="" if row is None else row.text("question_type", empty=True),
                    answer_type="" if row is None else row.text("answer_type", empty=True),
                )  # fmt: skip
        for row in told.values():
            with kept.row():
                raise row.error(f"the annotation is of the question {row.id('question_id')!r}, which is not in "
                                f"{questions.name}")  # fmt: skip

    def _asked(self, entry: Entry) -> str:
        return wording.question(entry.text("question"), self.wording, self.max_words)

    def _known(self, name: str) -> set[str] | None:
        """The vocabulary, where a split's questions are held against it."""
        if self.outside == "keep" or name.startswith("test") or name == "vg":
            return None
        return set(self.answers())

    def _inside(self, row: Entry, answers: list[str], known: set[str] | None) -> bool:
        """Whether an answer, as it is written, is in the vocabulary; a RowError if it must be."""
        if known is None or not known.isdisjoint(answers):
            return True
        if self.outside == "stop":
            raise row.error(f"none of its answers is among the {len(known)} of the vocabulary: {sorted(set(answers))}")
        return False

    # --- Visual Genome and lists --------------------------------------------------------------------------------------

    def read_genome(self, path: Path, kept: Kept) -> None:
        """Put Visual Genome's own questions into `kept`.

        Raises:
            DataError: if the file or a row cannot be read.
        """
        pictures = self._genome_pictures()
        for entry in json_rows(path):
            pairs: list[Entry] = []
            with kept.row():
                pairs = entry.inner("qas")
            for pair in pairs:
                with kept.row():
                    number = kept.once(pair, pair.id("qa_id"), "qa_id")
                    image = pair.id("image_id")
                    self._genome_row(kept, pair, pictures(pair, f"{image}.jpg"), image, number)

    def _genome_pictures(self) -> Pictures:
        if self.vg_pictures is not None:
            return Pictures(Path(self.vg_pictures), decode=self.on_error == "skip")
        below = ("image", "images", "VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2")
        places = [Path(self.root) / above / folder for above in ("vg", "visual_genome", "") for folder in below]
        return Pictures(*places, decode=self.on_error == "skip")

    def _genome_row(self, kept: Kept, entry: Entry, image: dict, image_id: str, number: str) -> None:
        answer = entry.text("answer")
        kept.add(image=image, image_id=image_id, question=self._asked(entry), question_id=number, answer=answer,
                 answers=[answer], weights=[self.vg_weight], question_type="", answer_type="")  # fmt: skip

    def _lists(self, name: str, kept: Kept) -> None:
        if name in ("test-dev", "trainable-val", "rest-val"):
            raise NotThere(f"{self}: the form 'xvlm' has no split {name!r}; it has train, val, test and vg")
        self.read_list(find_file(self.files, "vg_qa.json" if name == "vg" else f"vqa_{name}.json"), name, kept)

    def read_list(self, path: Path, name: str, kept: Kept) -> None:
        """Put the questions of a JSON list of X-VLM, BLIP or multiflow into `kept`.

        Raises:
            DataError: if the file or a row cannot be read.
        """
        pictures, genome = self.find_pictures("images", "coco", "mscoco"), self._genome_pictures()
        known = self._known(name)
        for entry in json_rows(path):
            with kept.row():
                of = entry.one_of("dataset", ("vqa", "vg")) if "dataset" in entry else "vqa"
                number, file = kept.once(entry, entry.id("question_id"), f"question_id of {of}"), entry.text("image")
                if of == "vg":  # the path begins with `image/`, wherever the pictures lie: as multiflow, its last part
                    self._genome_row(kept, entry, genome(entry, Path(file).name), Path(file).stem, number)
                    continue
                answers = [] if "answer" not in entry else entry.texts("answer")
                if not answers and name != "test":
                    raise entry.error("expected the field 'answer', a list of ten answers, found none")
                if answers and not self._inside(entry, answers, known):
                    continue
                common = max(answers, key=answers.count) if answers else ""
                end = Path(file).stem.rpartition("_")[2]
                kept.add(image=pictures(entry, file), image_id=str(int(end)) if end.isdigit() else Path(file).stem,
                         question=self._asked(entry), question_id=number, answer=common, answers=answers,
                         weights=[1 / len(answers) for _ in answers], question_type="", answer_type="")  # fmt: skip


@lru_cache(maxsize=4)  # each of a recipe's splits asks, and the files take a while
def _vocabulary(files: tuple[tuple[Path, int], ...], on_error: OnError) -> list[str]:
    """The published vocabulary of files of annotations, each with the time of its last change."""
    from trimtab.metrics.answers import vocabulary

    kept, found = Kept(on_error), []
    for path, _ in files:
        for entry in json_rows(path, "annotations"):
            with kept.row():
                found.append(entry.text("multiple_choice_answer", empty=True))
    return vocabulary(found)


def answer_list(path: Path) -> list[str]:
    """A vocabulary: a JSON list of answers, or an object from answers to their numbers.

    Raises:
        DataError: if it is neither, an answer stands twice, or the numbers are not 0, 1, 2, ...
    """
    found = read_json(path)
    if isinstance(found, Mapping):
        if sorted(found.values(), key=str) != sorted(range(len(found)), key=str):
            raise DataError(f"{path}: expected each answer to have a number of its own from 0 to {len(found) - 1}")
        found = sorted(found, key=lambda answer: found[answer])
    if not isinstance(found, list) or not all(isinstance(a, str) for a in found) or not found:
        raise DataError(f"{path}: expected a JSON list of answers, or an object from answers to numbers")
    if len(set(found)) < len(found):
        first = next(a for i, a in enumerate(found) if a in found[:i])
        raise DataError(f"{path}: the answer {first!r} stands twice")
    return list(found)


def _by_id(path: Path, key: str, kept: Kept) -> dict[str, Entry]:
    """The objects of a file by their `question_id`."""
    found: dict[str, Entry] = {}
    ids = Ids()
    for entry in json_rows(path, key):
        with kept.row():
            found[ids.once(entry, entry.id("question_id"), "question_id")] = entry
    return found


def _ten(row: Entry) -> list[str]:
    """The answers of an annotation, as written."""
    try:  # millions of them: each looked at in full only where something is wrong
        answers = [answer["answer"] for answer in row.get("answers", list)]
    except (TypeError, KeyError):
        answers = [None]
    if not all(isinstance(answer, str) for answer in answers):
        answers = [answer.text("answer", empty=True) for answer in row.inner("answers")]
    if not answers:
        raise row.error("expected ten answers, found none")
    return answers


def _last_pictures(path: Path, count: int) -> set[str]:
    """Ids of the last pictures of a file of annotations. ViLT shuffles before it cuts, so that its own set of 1,000 is
    not known; this one is the same each time."""
    pictures = list(dict.fromkeys(entry.id("image_id") for entry in json_rows(path, "annotations")))
    return set(pictures[-count:])
