"""SNLI-VE: does a picture entail a sentence?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from trimtab.data.base import SOURCES, Published
from trimtab.data.reading import Kept, find_file, json_lines

LABELS = ("contradiction", "neutral", "entailment")  # in METER's and LAVIS's order
PICTURE = ("Flickr30K_ID", "Flikr30kID")  # of the generator, and of the first release


@SOURCES.register("snli-ve")
@dataclass(frozen=True, kw_only=True)
class SNLIVE(Published):
    """SNLI-VE (Xie et al., 2019): 529,527 / 17,858 / 17,901 sentences about pictures of Flickr30K.

    Tables have `image`, `statement` (the hypothesis), `label`, `premise` (SNLI's text, which METER reads too),
    `pair_id`, `image_id`.
    """

    train: tuple[str, ...] = ("train",)
    """Official splits to train on."""
    validation: tuple[str, ...] = ("dev",)
    """Official splits from which searches draw their rewards."""
    test: tuple[str, ...] = ("test",)
    """Official splits to evaluate on."""

    tasks: ClassVar[tuple[str, ...]] = ("entailment",)
    splits: ClassVar[tuple[str, ...]] = ("train", "dev", "test")
    marks: ClassVar[dict[str, tuple[str, ...]]] = {"": ("snli_ve_*.jsonl",)}

    def read(self, task: str, name: str, kept: Kept) -> None:
        self.read_file(find_file(self.files, f"snli_ve_{name}.jsonl"), name, kept)

    def read_file(self, path: Path, name: str, kept: Kept) -> None:
        """Put the sentences of a file into `kept`.

        Raises:
            DataError: if the file or a row cannot be read.
        """
        pictures = self.find_pictures("flickr30k-images", "flickr30k_images", "Flickr30K/images", "images")
        for entry in json_lines(path):
            with kept.row():
                key = next((key for key in PICTURE if key in entry), None)
                if key is None:
                    raise entry.error(f"expected the field {' or '.join(map(repr, PICTURE))}, found neither")
                image = entry.id(key).removesuffix(".jpg")
                label = entry.text("gold_label")
                if label == "-":
                    raise entry.error("'gold_label' is '-': the annotators do not agree, and there is no label")
                kept.add(
                    image=pictures(entry, f"{image}.jpg"), image_id=image, statement=entry.text("sentence2"),
                    label=entry.one_of("gold_label", LABELS),
                    premise=entry.text("sentence1", empty=True) if "sentence1" in entry else "",
                    pair_id=kept.once(entry, entry.id("pairID"), "pairID"),
                )  # fmt: skip
