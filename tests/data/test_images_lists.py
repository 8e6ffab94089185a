"""Several pictures a row: decoded, kept as they are stored, left out, changed and shown."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow

from trimtab.data.augment import Augmentation
from trimtab.data.images import ImageError, beside, blanked, decode_rows, encoded, readable, shown


def picture(colour: str, size=(8, 6)):
    return Pillow.new("RGB", size, colour)


def table() -> Dataset:
    rows = {"images": [[picture("red"), picture("blue")], [picture("green")], []], "number": [0, 1, 2]}
    return Dataset.from_dict(rows, features=Features({"images": List(Image()), "number": Value("int64")}))


def test_pictures_of_a_list_are_left_encoded_without_writing_the_table_anew():
    rows = table().select([2, 0])
    found = encoded(rows)
    places = [[b.address for b in t.data.column("images").chunk(0).buffers() if b] for t in (rows, found)]
    assert places[0] == places[1] and places[0]
    assert found[1]["number"] == 0 and isinstance(found[1]["images"][0], dict) and found[0]["images"] == []
    assert isinstance(rows[1]["images"][0], Pillow.Image)  # the table given stays as it is
    assert encoded(found) is found
    decoded = decode_rows(list(found))
    assert [[p.getpixel((0, 0)) for p in row["images"]] for row in decoded] == [[], [(255, 0, 0), (0, 0, 255)]]


def test_a_bad_picture_of_a_list_is_named_or_its_row_left_out(caplog):
    rows = list(encoded(table()))
    rows[1]["images"] = [{"bytes": b"none", "path": None}]
    with pytest.raises(ImageError, match="picture 0 of row 1 of the batch: cannot be decoded"):
        decode_rows(rows)
    bad = Dataset.from_list(rows).cast_column("images", List(Image()))
    with caplog.at_level(logging.WARNING):
        assert readable(bad, "test")["number"] == [0, 2]
    assert "left out: row 1 of test" in caplog.text
    alone = Dataset.from_dict({"video": ["a.mp4"]})
    assert readable(alone) is alone


def test_what_stands_for_a_row():
    assert shown({"image": picture("red")}).size == (8, 6)
    pair = shown({"images": [picture("red", (10, 20)), picture("blue", (10, 10))]})
    assert pair.size == (10 + 4 + 20, 20)  # all as high as the highest
    assert [pair.getpixel((x, 5)) for x in (0, 11, 20)] == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]
    assert beside([picture("red")]).size == (8, 6)
    assert shown({"images": []}) is None and shown({"question": "why?"}) is None


def test_rows_without_pictures_to_look_at():
    row = {"images": [picture("red"), picture("blue")], "image": picture("red"), "statement": "x"}
    blank = blanked(row)
    assert blank["statement"] == "x" and len(blank["images"]) == 2 and blank["image"].getpixel((0, 0)) == (0, 0, 0)
    assert blanked({"statement": "x"}) == {"statement": "x"}


def test_each_picture_of_a_list_is_changed_by_itself():
    noise = Pillow.effect_noise((32, 32), 60).convert("RGB")
    rows = [{"images": [noise, noise], "label": "true"}]
    (changed,) = Augmentation(crop=0.3, light=0.4)(rows, torch.Generator().manual_seed(0))
    first, second = changed["images"]
    assert changed["label"] == "true" and first.size == second.size == (32, 32)
    assert first.tobytes() != second.tobytes() != noise.tobytes()
    assert rows[0]["images"][0] is noise
    with pytest.raises(ValueError, match="the rows hold videos: leave training.augmentation out"):
        Augmentation(light=0.4)([{"video": "a.mp4"}])
