from __future__ import annotations

import io

import pytest
from PIL import Image

from trimtab.data.images import ImageError, decode, decode_rows


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "blue.png"
    path.write_bytes(png("blue"))
    return path


def test_decode_takes_bytes_a_path_or_an_image(file):
    for cell, pixel in (
        ({"bytes": png(), "path": None}, (255, 0, 0)),
        ({"bytes": None, "path": str(file)}, (0, 0, 255)),
        ({"bytes": png(), "path": "gone.png"}, (255, 0, 0)),  # bytes count, the path is only a name
        (Image.new("RGB", (32, 16), "red"), (255, 0, 0)),
    ):
        image = decode(cell)
        assert image.size == (32, 16) and image.getpixel((3, 3)) == pixel


@pytest.mark.parametrize(
    "damage", [b"no image", png()[:60], b"\x89PNG\r\n\x1a\n", None], ids=["text", "cut", "head", "gone"]
)
def test_an_undecodable_image_is_named_by_its_path(damage, tmp_path):
    path = tmp_path / "bad.png"
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(ImageError) as error:
        decode({"bytes": None, "path": str(path)})
    assert str(path) in str(error.value) and "skip_bad_images" in str(error.value)


def test_without_a_path_it_is_named_by_its_place():
    rows = [{"image": {"bytes": png(), "path": None}}, {"image": {"bytes": b"no image", "path": None}}]
    with pytest.raises(ImageError, match="image 1 of the batch"):
        decode_rows(rows)


@pytest.mark.parametrize("cell", [{"bytes": None, "path": None}, None], ids=["empty", "null"])
def test_a_cell_without_an_image_is_an_image_error(cell):
    with pytest.raises(ImageError, match="image 0 of the batch"):
        decode_rows([{"image": cell}])


def test_skip_leaves_bad_rows_out_with_a_warning(file, caplog):
    rows = [
        {"image": {"bytes": png(), "path": None}, "question": "first"},
        {"image": {"bytes": b"no image", "path": "bad.png"}, "question": "second"},
        {"image": {"bytes": None, "path": str(file)}, "question": "third"},
    ]
    kept = decode_rows(rows, skip=True)
    assert [r["question"] for r in kept] == ["first", "third"]
    assert all(isinstance(r["image"], Image.Image) for r in kept)
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "bad.png" in caplog.text
    assert isinstance(rows[0]["image"], dict)  # the table's own rows are not touched


@pytest.mark.parametrize("skip", [False, True])
def test_nothing_but_bad_images_is_an_error(skip):
    with pytest.raises(ImageError, match=r"only\.png"):
        decode_rows([{"image": {"bytes": b"no image", "path": "only.png"}}], skip=skip)


def test_no_rows_are_no_error():
    assert decode_rows([], skip=True) == []
