"""Pictures with captions in the three published forms, and Flickr30K.

`karpathy`: one JSON file with all splits (Karpathy and Fei-Fei, CVPR 2015). `xvlm`: a JSON list a split, as X-VLM, BLIP
and multiflow read them; training has a row a caption. `precomp`: captions and picture ids a line, as VSE reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from trimtab.data import wording
from trimtab.data.base import CAPTIONED, SOURCES, Published
from trimtab.data.reading import DataError, Entry, Ids, Kept, Pictures, find_file, json_rows, read_json, text_lines


@dataclass(frozen=True, kw_only=True)
class Captioned(Published):
    """Pictures with several captions each.

    Tables have `image`, `captions`, `image_id`, `caption_ids` (empty where the form has none).
    """

    form: Literal["karpathy", "xvlm", "precomp"] = "karpathy"
    """Form of the files: Karpathy's JSON, X-VLM's and BLIP's JSON lists, or VSE's lines of captions and ids."""
    train: tuple[str, ...] = ("train",)
    """Official splits to train on."""
    validation: tuple[str, ...] = ("val",)
    """Official splits from which searches draw their rewards."""
    test: tuple[str, ...] = ("test",)
    """Official splits to evaluate on."""
    train_rows: Literal["picture", "caption"] = "picture"
    """Rows of the split `train`: a picture with all its captions, of which training draws one; or a row a caption, so
    that an epoch sees every caption, as X-VLM and BLIP train."""
    wording: Literal["as written", "xvlm", "blip"] = "as written"
    """How captions are prepared: not at all, or as the authors' code does (`trimtab.data.wording`)."""
    max_words: int = 30
    """Captions are cut to so many words in the wordings `xvlm` and `blip`."""

    tasks: ClassVar[tuple[str, ...]] = CAPTIONED
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    files_of: ClassVar[str] = ""  # in names of files: dataset_<this>.json, <this>_train.json
    folders: ClassVar[tuple[str, ...]] = ()  # of pictures, below the root

    def read(self, task: str, name: str, kept: Kept) -> None:
        if self.form == "karpathy":
            path = find_file(self.files, f"dataset_{self.files_of}.json")
        elif self.form == "xvlm":
            path = find_file(self.files, f"{self.files_of}_{name}.json", f"{self.files_of}_karpathy_{name}.json")
        else:
            path = find_file(self.files, f"{'dev' if name == 'val' else name}_caps.txt")
        self.read_file(path, name, kept)

    def read_file(self, path: Path, name: str, kept: Kept) -> None:
        """Put the rows of a split of one file into `kept`.

        Raises:
            DataError: if the file or a row cannot be read.
        """
        pictures = self.find_pictures(*self.folders)
        reading = {"karpathy": self._karpathy, "xvlm": self._lists, "precomp": self._lines}[self.form]
        reading(path, name, kept, pictures)

    # --- the forms ----------------------------------------------------------------------------------------------------

    def _karpathy(self, path: Path, name: str, kept: Kept, pictures: Pictures) -> None:
        ids = Ids()  # over all splits: a picture in two of them would be trained on and tested
        for entry in json_rows(path, "images"):
            with kept.row():
                split = entry.one_of("split", self.splits)
                file = self.karpathy_name(entry)
                ids.once(entry, file, "picture")
                if "imgid" in entry:
                    ids.once(entry, entry.id("imgid"), "imgid")
                if split != name:
                    continue
                sentences = entry.inner("sentences")
                if not sentences:
                    raise entry.error(f"the picture {file!r} has no caption: 'sentences' is empty")
                captions = [s.text("raw") for s in sentences]
                told = [s.id("sentid") for s in sentences if "sentid" in s]
                self._add(kept, entry, pictures(entry, file), captions, told, self.karpathy_id(entry), name)

    def karpathy_name(self, entry: Entry) -> str:
        """The path of a picture below the folder of pictures."""
        return entry.text("filename")

    def karpathy_id(self, entry: Entry) -> str:
        """The id of a picture."""
        return Path(entry.text("filename")).stem

    def _lists(self, path: Path, name: str, kept: Kept, pictures: Pictures) -> None:
        grouped: dict[str, tuple[Entry, str, list[str]]] = {}
        for entry in json_rows(path):
            with kept.row():
                file = entry.text("image")
                captions = entry.texts("caption") if isinstance(entry.get("caption"), list) else [entry.text("caption")]
                number = entry.id("image_id") if "image_id" in entry else self.list_id(file)
                if name != "train":
                    kept.once(entry, file, "picture")
                    self._add(kept, entry, pictures(entry, file), captions, [], number, name)
                elif self.train_rows == "caption":
                    self._add(kept, entry, pictures(entry, file), captions, [], number, name)
                else:
                    first, known, all_captions = grouped.setdefault(number, (entry, file, []))
                    if known != file:
                        raise entry.error(
                            f"image_id {number!r} has the picture {file!r}; in {first.row} it has {known!r}"
                        )
                    all_captions += captions
        for number, (entry, file, captions) in grouped.items():
            with kept.row():
                self._add(kept, entry, pictures(entry, file), captions, [], number, name)

    def list_id(self, file: str) -> str:
        """The id of a picture in X-VLM's and BLIP's lists for evaluation, which have none."""
        return Path(file).stem

    def _lines(self, path: Path, name: str, kept: Kept, pictures: Pictures) -> None:
        ids_file = path.with_name(path.name.replace("_caps.txt", "_ids.txt"))
        mapping_file = find_file(self.files, "id_mapping.json")
        mapping = read_json(mapping_file)
        if not isinstance(mapping, dict):
            raise DataError(f"{mapping_file}: expected a JSON object from picture ids to paths")
        captions, numbers = list(text_lines(path)), list(text_lines(ids_file))
        each = 1 if len(captions) == len(numbers) else 5
        if len(captions) != each * len(numbers):
            raise DataError(
                f"{path}: {len(captions)} captions, and {ids_file.name} has {len(numbers)} picture ids; expected as "
                "many, or five captions an id"
            )
        grouped: dict[str, tuple[Entry, list[str]]] = {}
        for i, (line, text) in enumerate(captions):
            entry = Entry({"caption": text.strip(), "id": numbers[i // each][1].strip()}, path, f"line {line}")
            with kept.row():
                grouped.setdefault(entry.text("id"), (entry, []))[1].append(entry.text("caption"))
        for number, (entry, texts) in grouped.items():
            with kept.row():
                if not isinstance(file := mapping.get(number), str):
                    raise entry.error(f"the picture id {number!r} is not in {mapping_file.name}")
                self._add(kept, entry, pictures(entry, file), texts, [], number, name)

    def _add(
        self, kept: Kept, entry: Entry, image: dict, captions: list[str], ids: list[str], number: str, name: str
    ) -> None:
        """Keep a picture with its captions: one row, or one a caption in training if that is asked."""
        told = [prepared(entry, c, self.wording, self.max_words) for c in captions]
        judged = {*self.official("validation"), *self.official("test")}
        split = self.train_rows == "caption" and name in self.official("train") and name not in judged
        for i in range(len(told)) if split else [None]:
            part = slice(None) if i is None else slice(i, i + 1)
            kept.add(image=image, captions=told[part], image_id=number, caption_ids=ids[part])


def prepared(entry: Entry, caption: str, words: wording.Wording, longest: int) -> str:
    """A caption in a wording; a RowError if nothing is left of it."""
    try:
        return wording.caption(caption, words, longest)
    except ValueError as error:
        raise entry.error(str(error)) from error


@SOURCES.register("flickr30k")
@dataclass(frozen=True, kw_only=True)
class Flickr30K(Captioned):
    """Flickr30K (Young et al., TACL 2014) with Karpathy's splits: 29,000 / 1,014 / 1,000 pictures, five captions each.

    ViLT trains on `train` and `val`: `train: [train, val]`.
    """

    files_of: ClassVar[str] = "flickr30k"
    marks: ClassVar[dict[str, tuple[str, ...]]] = {
        "karpathy": ("dataset_flickr30k.json",), "xvlm": ("flickr30k_*.json",),
    }  # fmt: skip
    folders: ClassVar[tuple[str, ...]] = ("flickr30k-images", "flickr30k_images", "images")
