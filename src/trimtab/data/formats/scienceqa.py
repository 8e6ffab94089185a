"""ScienceQA: questions of school science with choices, a hint, and a picture for about half of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from trimtab.data.base import SOURCES, Published
from trimtab.data.reading import DataError, Entry, Kept, Pictures, find_file, json_table, read_json
from trimtab.registry import unknown


@SOURCES.register("scienceqa")
@dataclass(frozen=True, kw_only=True)
class ScienceQA(Published):
    """ScienceQA (Lu et al., NeurIPS 2022): 12,726 / 4,241 / 4,241 questions.

    Tables have `images` (one or none), `question`, `choices`, `answer` (the text of the right choice), `hint` (may be
    empty), `question_id`, `subject` and `grade`, by which the published tables tell results apart.
    """

    train: tuple[str, ...] = ("train",)
    """Official splits to train on."""
    validation: tuple[str, ...] = ("val",)
    """Official splits from which searches draw their rewards."""
    test: tuple[str, ...] = ("test",)
    """Official splits to evaluate on."""

    tasks: ClassVar[tuple[str, ...]] = ("answer",)
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test", "trainval", "minitrain", "minival", "minitest")
    marks: ClassVar[dict[str, tuple[str, ...]]] = {"": ("pid_splits.json",)}

    def read(self, task: str, name: str, kept: Kept) -> None:
        problems = find_file(self.files, "problems.json")
        path = find_file(self.files, "pid_splits.json")
        splits = read_json(path)
        if not isinstance(splits, dict) or not isinstance(splits.get(name), list):
            found = splits if isinstance(splits, dict) else {}
            raise DataError(f"{path}: expected lists of question ids by split; {unknown('split', name, found)}")
        rows = dict(json_table(problems))
        pictures = self.find_pictures("images")
        for i, number in enumerate(splits[name]):
            at = Entry({"id": number}, path, f"{name}[{i}]")
            with kept.row():
                key = kept.once(at, at.id("id"), "question id")
                if key not in rows:
                    raise at.error(f"the question {key!r} is not in {problems.name}")
                kept.add(question_id=key, **self._row(rows[key], key, pictures))

    def _row(self, entry: Entry, key: str, pictures: Pictures) -> dict[str, Any]:
        choices, right = entry.texts("choices"), entry.number("answer")
        if not 0 <= right < len(choices):
            raise entry.error(f"expected 'answer' to be a choice from 0 to {len(choices) - 1}, found {right}")
        images = []
        if entry.get("image") is not None:
            name = entry.text("image")
            split = entry.text("split")
            found = next((p for p in (f"{split}/{key}/{name}", f"{key}/{name}") if pictures.find(p)), None)
            images = [pictures(entry, found or f"{split}/{key}/{name}")]
        return {
            "images": images, "question": entry.text("question"), "answer": choices[right], "choices": choices,
            "hint": entry.text("hint", empty=True) if entry.values.get("hint") else "",
            "subject": entry.text("subject", empty=True) if "subject" in entry else "",
            "grade": entry.text("grade", empty=True) if "grade" in entry else "",
        }  # fmt: skip
