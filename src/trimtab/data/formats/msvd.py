"""MSVD (Chen and Dolan 2011), as CLIP4Clip reads it: lists of videos, and a pickle of captions already in words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from trimtab.data import pickles
from trimtab.data.base import SOURCES, Published, Split
from trimtab.data.reading import Entry, Kept, find_file, text_lines


class Videos:
    """The video files below a folder, by their names without the last suffix.

    Args:
        suffixes: only files that end so, the preferred first; None for any.
        decode: look whether each can be decoded too, which takes as long as reading it.
    """

    def __init__(self, folder: Path, suffixes: tuple[str, ...] | None = None, decode: bool = False):
        self.folder, self.suffixes, self.decode = Path(folder), suffixes, decode
        self.found: dict[str, list[Path]] = {}
        for where, _, names in os.walk(folder, followlinks=True):
            for name in sorted(names):
                if suffixes is None or Path(name).suffix in suffixes:
                    self.found.setdefault(name.rpartition(".")[0] or name, []).append(Path(where) / name)

    def __call__(self, entry: Entry, video_id: str) -> str:
        """The path of a video.

        Raises:
            RowError: if there is none or more than one, or it cannot be decoded where that is asked.
        """
        found = self.found.get(video_id, [])
        for suffix in self.suffixes or ():
            if preferred := [p for p in found if p.suffix == suffix]:
                found = preferred
                break
        if not found:
            raise entry.error(f"the video {video_id!r} is not in {self.folder} or in a folder below it")
        if len(found) > 1:
            raise entry.error(f"the video {video_id!r} is there twice: {found[0]} and {found[1]}")
        if self.decode:
            from trimtab.data.video import fault  # brings numpy, which `--help` can do without

            if wrong := fault(found[0]):
                raise entry.error(f"the video {wrong}")
        return str(found[0])


def listed(path: Path, captions: Mapping[str, list[list[str]]], source: Path, kept: Kept
           ) -> Iterator[tuple[Entry, str, list[str]]]:  # fmt: skip
    """The videos of a list with all their captions, in the list's order.

    Args:
        captions: video -> its captions, each a list of words.
        source: where they are from, for messages.

    Raises:
        RowError: for a blank line, a video that stands twice, or one without captions.
    """
    for number, line in text_lines(path):
        entry, row = Entry({}, path, f"line {number}"), None
        with kept.row():
            if not (name := line.strip()):
                raise entry.error("expected the name of a video, found a blank line")
            kept.once(entry, name, "video")
            words = captions.get(name)
            if not words:
                raise entry.error(f"the video {name!r} has no captions in {source}")
            if not all(isinstance(c, list) and c and all(isinstance(w, str) for w in c) for c in words):
                raise entry.error(f"expected the captions of {name!r} in {source} to be lists of words")
            row = name, [" ".join(c) for c in words]
        if row is not None:
            yield entry, *row


@SOURCES.register("msvd")
@dataclass(frozen=True, kw_only=True)
class MSVD(Published):
    """MSVD: 1,970 short clips with about 40 captions each; 1,200 / 100 / 670 videos."""

    videos: Path | None = None
    """Folder of the videos, which may lie in folders below it; None looks below the root."""
    unfold: bool = True
    """One training row a caption, as CLIP4Clip trains; false gives one row a video. Others have all captions of a
    video in one row, and evaluation uses them all."""

    tasks = ("video-retrieval",)
    splits = ("train", "val", "test")
    marks: ClassVar[dict[str, tuple[str, ...]]] = {"": ("raw-captions.pkl",)}

    def official(self, split: Split) -> tuple[str, ...]:
        return ("val" if split == "validation" else split,)

    def read(self, task: str, name: str, kept: Kept) -> None:
        path, source = find_file(self.files, f"{name}_list.txt"), find_file(self.files, "raw-captions.pkl")
        captions = pickles.read(source, types=(dict,))
        videos = Videos(self.videos or self.root, decode=self.on_error == "skip")
        for entry, video_id, texts in listed(path, captions, source, kept):
            with kept.row():
                file = videos(entry, video_id)
                for group in [[t] for t in texts] if self.unfold and name == "train" else [texts]:
                    kept.add(video=file, video_id=video_id, captions=group)
