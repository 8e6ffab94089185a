"""MSR-VTT (Xu et al. 2016) in the splits of video retrieval: 7k or 9k videos to train on, the 1k-A test (JSFusion).

The csv files say which video is in which split; the split in the json is another protocol's and is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from trimtab.data.base import SOURCES, Published, Split
from trimtab.data.formats.msvd import Videos
from trimtab.data.reading import DataError, Entry, Kept, csv_rows, find_file, json_lines, json_rows

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".mp4", ".webm")  # CLIP4Clip looks for the first, then for the second


def sentences(path: Path, kept: Kept) -> Iterator[tuple[str, str]]:
    """(video, caption) of every sentence of `MSRVTT_data.json`, in its order.

    Raises:
        DataError: if the file or a row of it cannot be read.
    """
    for entry in json_rows(path, "sentences"):
        with kept.row():
            yield entry.id("video_id"), entry.text("caption")


def train_videos(path: Path, kept: Kept) -> Iterator[tuple[Entry, str]]:
    """The videos of a training csv, in its order.

    Raises:
        DataError: if the header lacks `video_id`, or a video stands twice.
    """
    for entry in csv_rows(path, ["video_id"]):
        with kept.row():
            yield entry, kept.once(entry, entry.text("video_id"), "video_id")


def test_rows(path: Path, kept: Kept) -> Iterator[tuple[Entry, str, str, str]]:
    """(key, video, sentence) of each row of the test csv, in its order, or of BLIP's json lines.

    Raises:
        DataError: if a column is missing.
    """
    blip = path.suffix != ".csv"
    key, video, sentence = ("retrieval_key", "clip_name", "caption") if blip else ("key", "video_id", "sentence")
    for entry in json_lines(path) if blip else csv_rows(path, [video, sentence]):
        with kept.row():
            yield entry, str(entry.values.get(key, "")), entry.text(video), entry.text(sentence)


@SOURCES.register("msr-vtt")
@dataclass(frozen=True, kw_only=True)
class MSRVTT(Published):
    """MSR-VTT: 10,000 clips with 20 captions each; tested on 1,000 of them with one sentence each (1k-A)."""

    train: Literal["9k", "7k"] = "9k"
    """Which list of training videos."""
    validation: int = 500
    """Videos taken from the end of the training list: searches draw their rewards from them. The published protocol has
    no validation split and trains on all; 0 does so, and leaves searches none."""
    unfold: bool = True
    """One training row a sentence, as CLIP4Clip trains; false gives one row a video."""
    form: Literal["csv", "blip"] = "csv"
    """Which file has the test rows: CLIP4Clip's `MSRVTT_JSFUSION_test.csv` or BLIP's `msrvtt_test.jsonl`."""
    videos: Path | None = None
    """Folder of the videos, which may lie in folders below it; None looks below the root."""

    tasks = ("video-retrieval",)
    splits = ("train", "test")
    marks: ClassVar[dict[str, tuple[str, ...]]] = {"csv": ("MSRVTT_*.csv",), "blip": ("msrvtt_test.jsonl",)}

    def official(self, split: Split) -> tuple[str, ...]:
        return ("test",) if split == "test" else ("train",)

    def load(self, task: str, split: Split) -> Dataset:
        """As `Published.load`.

        Raises:
            DataError: if `validation` leaves no video to train on.
        """
        if split == "test":
            return super().load(task, split)
        source = replace(self, rows=None, unfold=self.unfold and split != "validation")
        table = Published.load(source, task, split)
        path = find_file(self.files, f"MSRVTT_train.{self.train}.csv")
        listed = [video for _, video in train_videos(path, Kept("skip"))]
        if not 0 <= self.validation < len(listed):
            raise DataError(f"{self}: expected 'validation' to be from 0 to {len(listed) - 1} of the "
                            f"{len(listed)} videos of {path}, found {self.validation}")  # fmt: skip
        held_out = set(listed[len(listed) - self.validation :])
        videos = table["video_id"]
        chosen = [i for i, v in enumerate(videos) if (v in held_out) == (split == "validation")]
        return table.select(chosen[: self.rows])

    def read(self, task: str, name: str, kept: Kept) -> None:
        videos = Videos(self.videos or self.root, SUFFIXES, decode=self.on_error == "skip")
        if name != "test":
            return self._read_train(videos, kept)
        file = "MSRVTT_JSFUSION_test.csv" if self.form == "csv" else "msrvtt_test.jsonl"
        for entry, _, video, sentence in test_rows(find_file(self.files, file), kept):
            with kept.row():
                kept.once(entry, video, "video_id")
                kept.add(video=videos(entry, video), video_id=video, captions=[sentence])

    def _read_train(self, videos: Videos, kept: Kept) -> None:
        path = find_file(self.files, f"MSRVTT_train.{self.train}.csv")
        chosen = {video: entry for entry, video in train_videos(path, kept)}
        source = find_file(self.files, "MSRVTT_data.json")
        rows = [(video, text) for video, text in sentences(source, kept) if video in chosen]
        texts: dict[str, list[str]] = {}
        for video, text in rows:
            texts.setdefault(video, []).append(text)
        for video, entry in chosen.items():
            with kept.row():
                if video not in texts:
                    raise entry.error(f"the video {video!r} has no sentence in {source}")
        files: dict[str, str] = {}
        for video in texts:
            with kept.row():
                files[video] = videos(chosen[video], video)
        groups = [(v, [t]) for v, t in rows] if self.unfold else [(v, texts[v]) for v in chosen if v in texts]
        for video, captions in groups:
            if video in files:
                kept.add(video=files[video], video_id=video, captions=captions)
