"""NLVR2: pairs of pictures with statements, in its own JSON lines or in the JSON lists of X-VLM and BLIP."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from trimtab.data.base import SOURCES, Published
from trimtab.data.formats.karpathy import prepared
from trimtab.data.reading import Entry, Kept, NotThere, Pictures, find_file, json_lines, json_rows

LISTS = {"train": "nlvr_train", "dev": "nlvr_dev", "test1": "nlvr_test", "test2": "nlvr_test2"}
LABELS = {"True": "true", "False": "false"}


@SOURCES.register("nlvr2")
@dataclass(frozen=True, kw_only=True)
class NLVR2(Published):
    """NLVR2 (Suhr et al., ACL 2019): is a statement true of two pictures? 86,373 / 6,982 / 6,967 statements of train /
    dev / test1 (test-P).

    Tables have `images` (left, right), `statement`, `label` (`true` or `false`), `identifier` (empty in X-VLM's form,
    which has none). Pictures are opened by their content: files named `.png` may hold JPEG. BLIP swaps the pictures at
    random, and the words left and right; that is the task's to do.
    """

    form: Literal["official", "xvlm"] = "official"
    """Form of the files: NLVR2's JSON lines, or X-VLM's and BLIP's JSON lists."""
    train: tuple[str, ...] = ("train",)
    """Official splits to train on."""
    validation: tuple[str, ...] = ("dev",)
    """Official splits from which searches draw their rewards."""
    test: tuple[str, ...] = ("test1",)
    """Official splits to evaluate on; `test1` is the public test set, test-P."""
    wording: Literal["as written", "xvlm", "blip"] = "as written"
    """How statements are prepared: not at all, or as the authors' code does (`trimtab.data.wording`)."""
    max_words: int = 30
    """Statements are cut to so many words in the wordings; 30 in X-VLM, 40 in BLIP."""

    tasks: ClassVar[tuple[str, ...]] = ("pairs", "answer")
    splits: ClassVar[tuple[str, ...]] = (
        *LISTS, *(f"{kind}_{split}" for kind in ("balanced", "unbalanced") for split in ("dev", "test1", "test2"))
    )  # fmt: skip
    marks: ClassVar[dict[str, tuple[str, ...]]] = {
        "official": ("balanced_dev.json", "test1.json"), "xvlm": ("nlvr_*.json",),
    }  # fmt: skip

    def read(self, task: str, name: str, kept: Kept) -> None:
        if self.form == "xvlm" and name not in LISTS:
            raise NotThere(f"{self}: the form 'xvlm' has no split {name!r}; it has {', '.join(LISTS)}")
        names = (f"{LISTS[name]}.json",) if self.form == "xvlm" else (f"{name}.json", f"{name}.jsonl")
        self.read_file(find_file(self.files, *names), task, name, kept)

    def read_file(self, path: Path, task: str, name: str, kept: Kept) -> None:
        """Put the statements of a file into `kept`.

        Raises:
            DataError: if the file or a row cannot be read.
        """
        pictures = self.find_pictures("images", "nlvr2")
        for entry in json_lines(path) if self.form == "official" else json_rows(path):
            with kept.row():
                statement = prepared(entry, entry.text("sentence"), self.wording, self.max_words)
                if entry.get("label", str) not in LABELS:
                    raise entry.error(f'expected \'label\' to be "True" or "False", found {entry.get("label")!r}')
                label = LABELS[entry.text("label")]
                pair, identifier = self._pair(entry, name, kept, pictures)
                told = {"statement": statement, "label": label}
                if task == "answer":  # asked as a question that a chat model answers with one word
                    told = {"question": f"{statement} True or false?", "answer": label}
                kept.add(images=pair, identifier=identifier, **told)

    def _pair(self, entry: Entry, name: str, kept: Kept, pictures: Pictures) -> tuple[list[dict], str]:
        """The cells of the two pictures, left and right, and the identifier."""
        if self.form == "xvlm":
            files = entry.texts("images")
            if len(files) != 2:
                raise entry.error(f"expected 'images' to be two paths, left and right, found {len(files)}")
            return [pictures(entry, file) for file in files], ""
        identifier = kept.once(entry, entry.text("identifier"), "identifier")
        parts = identifier.rsplit("-", 3)  # split, set, pair, sentence
        if len(parts) != 4 or not all(p.isdigit() for p in parts[1:]):
            raise entry.error(f"expected 'identifier' to be SPLIT-SET-PAIR-SENTENCE, found {identifier!r}")
        folder = f"train/{entry.id('directory')}" if parts[0] == "train" else parts[0]
        stem = "-".join(parts[:3])
        return [pictures(entry, f"{folder}/{stem}-img{side}.png") for side in (0, 1)], identifier
