from __future__ import annotations

import io

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as DatasetImage
from PIL import Image

from trimtab.data.images import ImageError, decode, decode_rows, encoded, readable


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
    assert str(path) in str(error.value) and "drop_bad_images" in str(error.value)


def test_without_a_path_it_is_named_by_its_place():
    rows = [{"image": {"bytes": png(), "path": None}}, {"image": {"bytes": b"no image", "path": None}}]
    with pytest.raises(ImageError, match="image 1 of the batch"):
        decode_rows(rows)


@pytest.mark.parametrize(
    "cell",
    [
        {"bytes": None, "path": None},
        None,
    ],
)
def test_a_cell_without_an_image_is_an_image_error(cell):
    with pytest.raises(ImageError, match="image 0 of the batch"):
        decode_rows([{"image": cell}])


def test_decode_rows_leaves_the_tables_own_rows_alone():
    rows = [{"image": {"bytes": png(), "path": None}, "question": "what?"}]
    (row,) = decode_rows(rows)
    assert row["image"].size == (32, 16) and row["question"] == "what?"
    assert rows[0]["image"] == {"bytes": png(), "path": None}
    assert decode_rows([]) == []


def table(*cells: dict) -> Dataset:
    rows = {"image": list(cells), "number": list(range(len(cells)))}
    return Dataset.from_dict(rows, Features({"image": DatasetImage(), "number": Value("int32")}))


def test_encoded_gives_bytes_instead_of_pictures():
    plain = table({"bytes": png(), "path": None})
    assert encoded(plain)[0]["image"] == {"bytes": png(), "path": None}
    assert isinstance(plain[0]["image"], Image.Image)


def test_readable_leaves_bad_rows_out_with_a_warning(file, caplog):
    good, bad, nameless = {"bytes": png(), "path": None}, {"bytes": png()[:60], "path": "bad.png"}, {"bytes": b"no"}
    kept = readable(table(good, bad, {"bytes": None, "path": str(file)}, nameless | {"path": None}), "data test")
    assert kept["number"][:] == [0, 2]
    assert kept[1]["image"].getpixel((3, 3)) == (0, 0, 255)
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert "bad.png" in caplog.messages[0] and "row 3 of data test" in caplog.messages[1]


def test_readable_keeps_a_whole_table(caplog):
    whole = table(*[{"bytes": png(), "path": None}] * 3)
    assert readable(whole)["number"][:] == [0, 1, 2] and not caplog.records


def test_a_table_without_a_readable_image_is_an_error():
    with pytest.raises(ImageError, match="data train: none of its 2 images can be decoded"):
        readable(table(*[{"bytes": b"no image", "path": "bad.png"}] * 2), "data train")


def test_a_draft_of_a_jpeg_is_at_least_as_large_as_asked_and_close_to_the_whole():
    whole = Image.effect_noise((640, 480), 60).resize((80, 60)).resize((640, 480)).convert("RGB")
    content = io.BytesIO()
    whole.save(content, "JPEG", quality=95)
    cell = {"bytes": content.getvalue(), "path": None}
    sizes = {side: decode(cell, side=side).size for side in (None, 480, 240, 241, 100, 10)}
    assert sizes == {None: (640, 480), 480: (640, 480), 240: (320, 240), 241: (640, 480), 100: (160, 120), 10: (80, 60)}
    few, all_ = (decode(cell, side=side).resize((64, 48), Image.Resampling.BICUBIC) for side in (100, None))
    difference = [abs(a - b) for a, b in zip(few.tobytes(), all_.tobytes(), strict=True)]
    assert sum(difference) / len(difference) < 2 and few.tobytes() != all_.tobytes()
    content = io.BytesIO()
    whole.save(content, "PNG")
    assert decode({"bytes": content.getvalue(), "path": None}, side=10).size == (640, 480), "of JPEG alone"
