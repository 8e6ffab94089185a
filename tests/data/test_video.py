from __future__ import annotations

import numpy as np
import pytest

from trimtab.data import video
from trimtab.data.video import Length, by_second, evenly

# As CLIP4Clip's `RawVideoExtractor` and BLIP's `VideoDataset` give them for these lengths.
CLIP4CLIP = [
    (Length(8, 8.0), 4, None, "first", [0, 2, 4, 6]),
    (Length(30, 10.0), 1, None, "first", [0, 10, 20]),
    (Length(317, 29.97), 1, 4, "first", [0, 29, 58, 87]),
    (Length(317, 29.97), 1, 4, "last", [203, 232, 261, 290]),
    (Length(317, 29.97), 1, 4, "spread", [0, 87, 174, 290]),
    (Length(450, 15.0), 2, 6, "first", [0, 7, 15, 22, 30, 37]),
    (Length(20, 7.5), 3, None, "first", [0, 2, 4, 7, 9, 11, 14, 16, 18]),
]
BLIP = [(8, 4, [0, 2, 4, 6]), (10, 4, [0, 2, 4, 6]), (29, 12, list(range(0, 24, 2))), (300, 8, list(range(0, 260, 37)))]


@pytest.mark.parametrize(("length", "rate", "most", "keep", "wanted"), CLIP4CLIP)
def test_positions_by_second(length, rate, most, keep, wanted):
    assert by_second(length, rate, most, keep) == wanted


def test_no_frames_of_each_second_means_all_of_them():
    """As in CLIP4Clip's code."""
    assert by_second(Length(7, 3.9), 0) == list(range(7))


@pytest.mark.parametrize(("frames", "count", "wanted"), BLIP)
def test_positions_evenly(frames, count, wanted):
    assert evenly(Length(frames, 25.0), count) == wanted


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: by_second(Length(9, 0.5)), "at least one frame a second, found 0.5"),
        (lambda: by_second(Length(9, 8), 9), r"from 0 \(all\) to 8 frames of each second"),
        (lambda: by_second(Length(9, 8), keep="middle"), "expected one of first, last, spread"),
        (lambda: evenly(Length(3, 8), 4), "a video of at least 4 frames, found 3"),
    ],
)
def test_positions_that_there_are_not(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def film(tmp_path):
    pytest.importorskip("av")
    from tests.data.official import film

    return film(tmp_path / "a.mp4", ["red", "green", "blue", "white", "red", "blue"])


def test_frames_are_those_of_their_positions(film):
    from tests.data.official import COLOURS

    assert video.measure(film) == Length(6, 4.0)
    for rule, colours in (
        (lambda x: [3, 1, 1], ["white", "green", "green"]),
        (lambda x: evenly(x, 2), ["red", "white"]),
        (by_second, ["red", "red"]),
    ):
        found = [np.asarray(p, float).mean((0, 1)) for p in video.read(film, rule)]
        assert np.abs(np.subtract(found, [COLOURS[c] for c in colours])).max() < 8


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda x: evenly(x, 7), "a.mp4: expected a video of at least 7 frames, found 6"),
        (lambda x: [6], "a.mp4: expected positions from 0 to 5 of its 6 frames"),
    ],
)
def test_a_video_that_is_too_short(film, rule, message):
    with pytest.raises(video.VideoError, match=message):
        video.read(film, rule)


def test_a_file_that_is_no_video(film, tmp_path):
    (tmp_path / "b.mp4").write_bytes(b"<html>gone</html>" * 40)
    (tmp_path / "c.mp4").write_bytes(film.read_bytes()[:300])
    for name, why in (("b.mp4", "cannot be decoded as a video"), ("c.mp4", "found a file without a picture stream")):
        with pytest.raises(video.VideoError, match=rf"{name}: .*{why}"):
            video.read(tmp_path / name, by_second)
    with pytest.raises(FileNotFoundError, match=r"d\.mp4: there is no such video"):
        video.read(tmp_path / "d.mp4", by_second)


def test_a_phone_held_upright_gives_upright_frames(film, tmp_path):
    """The turn is in the head of the file: its matrix says a quarter to the right."""
    content = film.read_bytes()
    plain = b"".join(v.to_bytes(4, "big") for v in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    quarter = b"".join((v % 2**32).to_bytes(4, "big") for v in (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30))
    start = content.index(b"tkhd")
    at = content.index(plain, start)
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(content[:at] + quarter + content[at + len(plain) :])
    from PIL import Image

    shot = video.read(turned, lambda x: [0])[0]
    assert shot.size == (32, 32)
    marked = Image.new("RGB", (4, 2))
    marked.putpixel((0, 0), (255, 0, 0))  # the corner that a quarter to the right brings to the right

    class Frame:
        rotation = -90  # what PyAV gives for this file

        def to_image(self):
            return marked

    import av

    with av.open(str(turned)) as container:
        assert next(container.decode(video=0)).rotation == Frame.rotation
    upright = video._upright(Frame())
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (255, 0, 0)
