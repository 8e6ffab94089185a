"""Short clips in which one thing moves, and what is said of them.

A number gives two clips: the second is the first, played backwards, with the words for that. All their frames are the
same, so that a model which looks at frames without their order cannot tell the two apart.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from trimtab.data.pictograms.concepts import art, concepts
from trimtab.data.pictograms.kinds import KINDS, Kind, Rows, strings, value
from trimtab.data.pictograms.language import article
from trimtab.data.pictograms.scenes import World, backdrop

FRAMES, RATE = 12, 4  # three seconds
# A motion and what it is backwards; x and y of the centre and the side, as shares of the picture, at both ends.
MOTIONS = {
    "moves to the right": ("moves to the left", (0.25, None, 0.36), (0.75, None, 0.36)),
    "moves down": ("moves up", (None, 0.25, 0.36), (None, 0.75, 0.36)),
    "grows": ("shrinks", (None, None, 0.2), (None, None, 0.46)),
    "leaves the top left corner": ("comes into the top left corner", (0.22, 0.22, 0.36), (0.72, 0.72, 0.36)),
}


def clip(world: World, rng: np.random.Generator) -> tuple[np.ndarray, str, str, list[str]]:
    """(frames (T, H, W, 3), motion, the motion backwards, names of the mover and of what stands still)."""
    size, drawings = world.size, art(world.style, world.count)
    while True:
        chosen = list(dict.fromkeys(world.choose(rng)))[:2]
        if world.split != "unseen-combinations" or not world.allows(chosen):  # the pair for which it was made is shown
            break
    motion = list(MOTIONS)[int(rng.integers(len(MOTIONS)))]
    back, start, end = MOTIONS[motion]
    free = (rng.uniform(0.44, 0.56), rng.uniform(0.44, 0.56), 0.36)
    ground = backdrop(rng, size)
    if len(chosen) == 2:  # what stands still stands in a corner that the mover does not cross
        side, corner = 0.2, (0.88, 0.12) if rng.random() < 0.5 else (0.12, 0.88)
        _put(ground, _variant(drawings[chosen[1]], rng), (*corner, side))
    mover = _variant(drawings[chosen[0]], rng)
    frames = []
    for step in np.linspace(0, 1, FRAMES):
        where = [f if a is None or b is None else a + (b - a) * step for a, b, f in zip(start, end, free, strict=True)]
        frame = ground.copy()
        _put(frame, mover, (where[0], where[1], where[2]))
        frames.append(np.asarray(frame.convert("RGB")))
    return np.stack(frames), motion, back, [concepts(world.count)[i].name for i in chosen]


def _variant(drawings: tuple[np.ndarray, ...], rng: np.random.Generator) -> np.ndarray:
    return drawings[int(rng.integers(len(drawings)))]


def _put(canvas: Image.Image, drawing: np.ndarray, where: tuple[float, float, float]) -> None:
    """Set a drawing onto a canvas: x and y of its centre and its longer side, as shares of the canvas."""
    size = canvas.width
    height, width = drawing.shape[:2]
    scale = where[2] * size / max(height, width)
    small = Image.fromarray(drawing).resize(
        (max(2, round(width * scale)), max(2, round(height * scale))), Image.Resampling.BILINEAR
    )
    at = (round(where[0] * size - small.width / 2), round(where[1] * size - small.height / 2))
    canvas.paste(small, at, small)


def encoded(frames: np.ndarray, rate: int = RATE) -> bytes:
    """An MP4 file (H.264) of frames (T, H, W, 3), uint8, with even sides.

    Raises:
        ImportError: if the package `av` is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need the package 'av': pip install -e '.[video]' in trimtab's folder") from error
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        # With lookahead the file is not the same each time it is made.
        stream.options = {"crf": "12", "threads": "1", "preset": "ultrafast", "x264-params": "rc-lookahead=0"}
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def _captions(motion: str, names: list[str], rng: np.random.Generator) -> list[str]:
    mover = article(names[0])
    still = [f" and {article(names[1])} stands still", f" beside {article(names[1])}"] if names[1:] else ["", ""]
    said = [f"{mover} {motion}{still[0]}", f"{mover} {motion}{still[1]}", f"a video of {mover} that {motion}",
            f"in this clip {mover} {motion}"]  # fmt: skip
    return [said[i] for i in rng.permutation(len(said))]


def rows(world: World, index: int) -> Rows:
    rng = world.rng(index, 5)
    frames, motion, back, names = clip(world, rng)
    return [
        {"video": encoded(shown), "captions": _captions(words, names, rng), "video_id": f"{world.split}-{index}-{k}"}
        for k, (shown, words) in enumerate(((frames, motion), (frames[::-1], back)))
    ]


KINDS.register("video")(
    Kind(rows, lambda: {"video": value("string"), "captions": strings(), "video_id": value("string")}, True)
)
