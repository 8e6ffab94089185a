"""MS-COCO captions: Karpathy's splits in the forms of `karpathy.py`, and the official files of captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from trimtab.data.base import CAPTIONED, SOURCES, Published
from trimtab.data.formats.karpathy import Captioned, prepared
from trimtab.data.reading import Entry, Kept, find_file, json_rows


@SOURCES.register("coco")
@dataclass(frozen=True, kw_only=True)
class COCO(Captioned):
    """MS-COCO captions (Chen et al., 2015) with Karpathy's splits: 113,287 / 5,000 / 5,000 pictures.

    Training is Karpathy's `train` and `restval`. A picture has five captions, some six or seven; all are kept.
    """

    train: tuple[str, ...] = ("train", "restval")
    """Official splits to train on; X-VLM's and VSE's files have `restval` in `train`."""

    splits: ClassVar[tuple[str, ...]] = ("train", "restval", "val", "test", "testall")
    marks: ClassVar[dict[str, tuple[str, ...]]] = {
        "karpathy": ("dataset_coco.json",), "xvlm": ("coco_karpathy_*.json",),
    }  # fmt: skip
    files_of: ClassVar[str] = "coco"
    folders: ClassVar[tuple[str, ...]] = ("images", "coco")

    def official(self, split: Literal["train", "validation", "test"]) -> tuple[str, ...]:
        names = super().official(split)
        return names if self.form == "karpathy" else tuple(n for n in names if n != "restval")

    def karpathy_name(self, entry: Entry) -> str:
        return f"{entry.text('filepath')}/{entry.text('filename')}"

    def karpathy_id(self, entry: Entry) -> str:
        return entry.id("cocoid")

    def list_id(self, file: str) -> str:
        """The number at the end of the file's name, as BLIP's evaluation takes it."""
        end = Path(file).stem.rpartition("_")[2]
        return str(int(end)) if end.isdigit() else Path(file).stem


@SOURCES.register("coco-captions")
@dataclass(frozen=True, kw_only=True)
class COCOCaptions(Published):
    """MS-COCO's own files of captions, `captions_val2014.json`: one row a picture, in the order of the file.

    The captions of the official test pictures are not published; evaluation is on the validation pictures.
    """

    train: tuple[str, ...] = ("train2014",)
    """Official splits to train on."""
    validation: tuple[str, ...] = ("val2014",)
    """Official splits from which searches draw their rewards."""
    test: tuple[str, ...] = ("val2014",)
    """Official splits to evaluate on."""
    wording: Literal["as written", "xvlm", "blip"] = "as written"
    """How captions are prepared: not at all, or as the authors' code does (`trimtab.data.wording`)."""
    max_words: int = 30
    """Captions are cut to so many words in the wordings `xvlm` and `blip`."""

    tasks: ClassVar[tuple[str, ...]] = CAPTIONED
    splits: ClassVar[tuple[str, ...]] = ("train2014", "val2014", "train2017", "val2017")
    marks: ClassVar[dict[str, tuple[str, ...]]] = {"": ("captions_*20*.json",)}

    def read(self, task: str, name: str, kept: Kept) -> None:
        self.read_file(find_file(self.files, f"captions_{name}.json"), name, kept)

    def read_file(self, path: Path, name: str, kept: Kept) -> None:
        """Put the rows of a file of captions into `kept`; pictures lie in a folder `name`.

        Raises:
            DataError: if the file or a row cannot be read.
        """
        pictures = self.find_pictures(name, f"images/{name}", "images")
        images: dict[str, Entry] = {}
        for entry in json_rows(path, "images"):
            with kept.row():
                images[kept.once(entry, entry.id("id"), "id of a picture")] = entry
        told: dict[str, list[tuple[str, str]]] = {image: [] for image in images}
        for entry in json_rows(path, "annotations"):
            with kept.row():
                number, image = kept.once(entry, entry.id("id"), "id of a caption"), entry.id("image_id")
                if image not in told:
                    raise entry.error(f"the caption is of the picture {image!r}, which is not in 'images'")
                told[image].append((number, entry.text("caption")))
        for image, entry in images.items():
            with kept.row():
                file = entry.text("file_name")
                if not told[image]:
                    raise entry.error(f"the picture {file!r} has no caption in 'annotations'")
                captions = [prepared(entry, c, self.wording, self.max_words) for _, c in told[image]]
                kept.add(image=pictures(entry, file), captions=captions, image_id=image,
                         caption_ids=[n for n, _ in told[image]])  # fmt: skip
