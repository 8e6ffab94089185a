"""Flickr8K in its own text files, or in Karpathy's JSON."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from trimtab.data.base import SOURCES
from trimtab.data.formats.karpathy import Captioned
from trimtab.data.reading import DataError, Entry, Ids, Kept, Pictures, find_file, text_lines

log = logging.getLogger(__name__)

LISTS = {"train": "train", "val": "dev", "test": "test"}
_PUBLISHED = re.compile(r"\d+_[0-9a-f]+\.jpg")  # how the 8,091 pictures of the set are named


@SOURCES.register("flickr8k")
@dataclass(frozen=True, kw_only=True)
class Flickr8K(Captioned):
    """Flickr8K (Hodosh et al., JAIR 2013): 6,000 / 1,000 / 1,000 pictures, five captions each.

    Copies of its text files in circulation name 100 pictures more, of another set (`e44_01.jpg`). Those whose file is
    not there are passed over and counted in the log; a picture of the set's own that is not there is an error.
    """

    form: Literal["text", "karpathy", "xvlm", "precomp"] = "text"  # type: ignore[assignment]
    """Form of the files: the set's own text files, or one of those of Flickr30K."""

    files_of: ClassVar[str] = "flickr8k"
    marks: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("Flickr8k.token.txt",), "karpathy": ("dataset_flickr8k.json",),
    }  # fmt: skip
    folders: ClassVar[tuple[str, ...]] = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")

    def read(self, task: str, name: str, kept: Kept) -> None:
        if self.form != "text":
            super().read(task, name, kept)
            return
        pictures = self.find_pictures(*self.folders, *(f"{f}/{f}" for f in self.folders))
        self._listed(find_file(self.files, f"Flickr_8k.{LISTS[name]}Images.txt"), name, kept, pictures)

    def _listed(self, path: Path, name: str, kept: Kept, pictures: Pictures) -> None:
        captions = self._captions(find_file(self.files, "Flickr8k.token.txt"), kept)
        passed = 0
        for line, text in text_lines(path):
            file = text.strip()
            if not file:
                continue
            entry = Entry({"picture": file}, path, f"line {line}")
            with kept.row():
                if pictures.find(file) is None and not _PUBLISHED.fullmatch(file):
                    passed += 1
                    continue
                kept.once(entry, file, "picture")
                if file not in captions:
                    raise entry.error(f"the picture {file!r} has no caption in Flickr8k.token.txt")
                told, ids = captions[file], Ids()
                for each in told:  # here and not before: the other set's captions have faults that touch nobody
                    ids.once(each, each.text("id"), "number of a caption")
                    if "\t" in each.text("caption"):
                        raise each.error("two captions run together in one line")
                texts = [e.text("caption") for e in told]
                numbers = [e.text("id") for e in told]
                self._add(kept, entry, pictures(entry, file), texts, numbers, Path(file).stem, name)
        if passed:
            log.info("%s: passed over %d names of pictures of another set that are not there", path, passed)

    def _captions(self, path: Path, kept: Kept) -> dict[str, list[Entry]]:
        """Name of a picture -> its captions in the order of their numbers."""
        found: dict[str, list[Entry]] = {}
        for line, text in text_lines(path):
            if not text.strip():
                continue
            key, tab, caption = text.partition("\t")
            file, sign, number = key.partition("#")
            fault = "" if tab and sign and number.isdigit() else "expected `NAME.jpg#n`, a tab and a caption"
            entry = Entry({"id": key, "caption": caption.strip(), "number": int(number) if not fault else 0}, path,
                          f"line {line}", fault)  # fmt: skip
            with kept.row():
                _ = entry.values  # a line of another form is an error, whosever it is
                found.setdefault(file, []).append(entry)
        if not found:
            raise DataError(f"{path}: holds no captions")
        return {file: sorted(entries, key=lambda e: e.number("number")) for file, entries in found.items()}
