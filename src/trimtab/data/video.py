"""Frames of video files: which ones to read, and reading them (PyAV, installed with `trimtab[video]`).

CLIP4Clip takes the first few positions of each second, then at most so many frames (Luo et al., 2021, and
`dataloaders/rawvideo_util.py` of its code); BLIP takes evenly spaced ones (`data/video_dataset.py` of its code).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

KEEP = ("first", "last", "spread")


class VideoError(ValueError):
    """A video that cannot be read, or that is too short; the message names the file."""


@dataclass(frozen=True)
class Length:
    """How long a video is: number of frames, and frames a second."""

    frames: int
    fps: float


Rule = Callable[[Length], Sequence[int]]


def by_second(
    length: Length,
    per_second: int = 1,
    most: int | None = None,
    keep: Literal["first", "last", "spread"] = "first",
) -> list[int]:
    """Positions as CLIP4Clip reads them: the rate as a whole number, the first `per_second` places of each second.

    Args:
        per_second: CLIP4Clip's `feature_framerate`; 0 takes every frame.
        most: its `max_frames`; None for all.
        keep: which ones, if there are more: its `slice_framepos` 0, 1 and 2.

    Raises:
        ValueError: if `per_second` is not from 0 to the frames in a second, or the rate is below one a second.
    """
    fps = int(length.fps)  # as CLIP4Clip: 29.97 counts as 29
    if fps < 1:
        raise ValueError(f"expected at least one frame a second, found {length.fps}; use evenly spaced frames instead")
    if not 0 <= per_second <= fps:
        raise ValueError(f"expected from 0 (all) to {fps} frames of each second (the video's rate), asked for "
                         f"{per_second}")  # fmt: skip
    per_second = per_second or fps
    if keep not in KEEP:
        raise ValueError(f"which frames to keep: expected one of {', '.join(KEEP)}, found {keep!r}")
    offsets = range(0, fps, fps // per_second)[:per_second]
    found = [second + i for second in range(0, length.frames, fps) for i in offsets if second + i < length.frames]
    if most is None or most >= len(found):
        return found
    if keep == "spread":
        return [found[i] for i in np.linspace(0, len(found) - 1, num=most, dtype=int)]
    return found[:most] if keep == "first" else found[-most:]


def evenly(length: Length, count: int) -> list[int]:
    """`count` positions from the first frame on, as BLIP takes them: a whole number of frames apart, so that the end of
    the video is not reached.

    Raises:
        ValueError: if the video has fewer frames.
    """
    if count > length.frames:
        raise ValueError(f"expected a video of at least {count} frames, found {length.frames}")
    step = length.frames // count
    return [i * step for i in range(count)]


def read(path: str | Path, rule: Rule) -> list[Image]:
    """The frames of a video at the positions that a rule gives for its length, as RGB pictures, in that order.

    `read(path, lambda length: by_second(length, most=12))`

    Raises:
        ImportError: if PyAV is not installed.
        FileNotFoundError: if there is no such file.
        VideoError: if the file is no video, is damaged, or is too short for the rule.
    """
    length = measure(path)
    found = _at(path, rule, length)
    if isinstance(found, int):  # it has fewer frames than packets: the rule is asked again with what there is
        found = _at(path, rule, Length(found, length.fps))
    if isinstance(found, int):
        raise VideoError(f"{path}: gives another number of frames each time that it is decoded")
    return found


def fault(path: str | Path) -> str:
    """What is wrong with a video; empty if its last frame can be reached, for which all of it is decoded.

    Raises:
        ImportError: if PyAV is not installed.
    """
    try:
        read(path, lambda length: [length.frames - 1])
    except VideoError as error:
        return str(error)
    return ""


def _at(path: str | Path, rule: Rule, length: Length) -> list[Image] | int:
    """The frames that the rule wants of a video of this length, or how many frames it has if it ends before."""
    try:
        wanted = list(rule(length))
    except ValueError as error:
        raise VideoError(f"{path}: {error}") from error
    if not wanted or not all(0 <= i < length.frames for i in wanted):
        raise VideoError(f"{path}: expected positions from 0 to {length.frames - 1} of its {length.frames} frames, "
                         f"asked for {wanted}")  # fmt: skip
    needed, last, found = set(wanted), max(wanted), {}
    number = -1
    for number, frame in enumerate(_frames(path)):
        if number in needed:
            found[number] = _upright(frame)
        if number == last:
            return [found[i] for i in wanted]
    return number + 1


def measure(path: str | Path) -> Length:
    """Frames and rate of a video. Frames are counted by reading the file's packets without decoding them: what
    containers say of their length is often missing or wrong.

    Raises:
        As `read`.
    """
    with _opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        count = sum(1 for packet in _guarded(path, container.demux(stream)) if packet.size)
    if not count:
        raise VideoError(f"{path}: expected a video, found no frame in it")
    return Length(count, float(rate or 0))


def _frames(path: str | Path) -> Iterator[Any]:
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        yield from _guarded(path, container.decode(stream))


def _guarded(path: str | Path, items: Iterator[Any]) -> Iterator[Any]:
    """Packets or frames; what stops them is told with the file's name."""
    import av

    number = 0
    try:
        for item in items:
            yield item
            number += 1
    except av.FFmpegError as error:
        raise VideoError(f"{path}: cannot be decoded after frame {number} ({error})") from error


class _opened:
    """The container and its first video stream, closed at the end."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __enter__(self) -> tuple[Any, Any]:
        try:
            import av
        except ImportError as error:
            raise ImportError("reading videos needs PyAV: pip install -e '.[video]' in trimtab's folder") from error
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: there is no such video")
        try:
            self.container = av.open(str(self.path))
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(f"{self.path}: cannot be decoded as a video ({error})") from error
        if not self.container.streams.video:
            self.container.close()
            raise VideoError(f"{self.path}: expected a video, found a file without a picture stream")
        return self.container, self.container.streams.video[0]

    def __exit__(self, *_: object) -> None:
        self.container.close()


def _upright(frame: Any) -> Image:
    """A frame as RGB picture, turned as the file says that it was held."""
    picture = frame.to_image()
    turn = int(getattr(frame, "rotation", 0) or 0)
    return picture.rotate(turn, expand=True) if turn else picture
