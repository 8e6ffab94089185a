"""Rows that show one picture: they are held out together, and scored together."""

from __future__ import annotations

import csv

import pytest
from datasets import Dataset, Features, Image, List, Value

from tests.data import official
from trimtab.data import identity
from trimtab.data.formats.users import Datasets, Files
from trimtab.data.reading import DataError, RowError
from trimtab.data.sources import EasyVQA
from trimtab.tasks.base import TASKS


@pytest.fixture
def by_caption(tmp_path):
    """Ten pictures, five rows each with a caption, as Flickr's CSV files have them."""
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for i in range(10):
            official.picture(tmp_path / f"{i}.png", form="PNG")
            writer.writerows([f"{i}.png", f"[{i}] words {k}"] for k in range(5))
    return tmp_path / "a.csv"


def files(path, **more):
    return Files(path, path, columns={"captions": "caption"}, **more)


def test_a_picture_in_two_rows_is_not_scored(by_caption):
    table = files(by_caption).load("retrieval", "test")
    assert table["captions"][0] == ["[0] words 0"]  # no list, though it begins like one
    for name in ("retrieval", "captioning", "reranking"):
        with pytest.raises(ValueError, match=rf"'{name}': rows 0 and 1 show the same, '.*0.png'.*data.group=true"):
            TASKS[name]().check_scored(table)
    TASKS["retrieval"](captions="first").check_scored(table)  # where any caption with the same words is right


def test_rows_of_a_picture_are_joined(by_caption):
    table = files(by_caption, group=True).load("retrieval", "test")
    assert len(table) == 10 and table["captions"][3] == [f"[3] words {k}" for k in range(5)]
    assert set(table.column_names) == {"image", "captions"} and table[3]["image"].size == (40, 30)
    TASKS["retrieval"]().check_scored(table)
    with pytest.raises(ValueError, match="group: joins the captions of a picture, and there is no column 'captions'"):
        identity.grouped(table.remove_columns("captions"))


def test_what_is_held_out_is_no_picture_that_is_trained_on(by_caption):
    source = files(by_caption, held_out=0.2)
    held, trained = (set(identity.identities(source.load("retrieval", s))) for s in ("validation", "train"))
    assert len(held) == 2 and len(trained) == 8 and not held & trained
    with pytest.raises(DataError, match="too few to hold out 0.01"):
        files(by_caption, held_out=0.01).load("retrieval", "train")


@pytest.mark.parametrize("train", [None, 400])
def test_no_picture_of_easy_vqa_is_on_both_sides(train):
    source = EasyVQA(train=train, validation=100)
    sides = [source.load("vqa", split) for split in ("train", "validation")]
    shown = [set(identity.identities(side)) for side in sides]
    assert len(sides[1]) == 100 and None not in shown[0] | shown[1] and not shown[0] & shown[1]
    assert train is None or len(sides[0]) == train


def test_validation_rows_that_are_the_test_rows_are_told_of(by_caption, tmp_path):
    table = files(by_caption).load("retrieval", "test")
    with pytest.warns(UserWarning, match="validation and test rows are the same 50"):
        identity.warn_if_same(table, table.select(range(50)), "test")
    with pytest.warns(UserWarning, match="validation and training rows are the same 50: .* learned by heart"):
        identity.warn_if_same(table, table.select(range(50)), "training")
    (tmp_path / "sets").mkdir()
    for split in ("train", "validation"):
        table.select(range(5 if split == "train" else 6)).to_parquet(tmp_path / "sets" / f"{split}.parquet")
    source = Datasets(root=tmp_path / "sets", test="validation")
    assert [len(source.load("retrieval", s)) for s in ("train", "validation", "test")] == [5, 5, 6]


def test_pictures_in_a_table_are_told_apart_by_more_than_their_name():
    cells = [{"path": "1.png", "bytes": b"a"}, {"path": "1.png", "bytes": b"bb"}, {"path": None, "bytes": b"a"}]
    table = Dataset.from_dict({"image": cells}, features=Features({"image": Image(decode=False)}))
    assert identity.repeated(table) is None and identity.paths(table) == [None] * 3
    assert identity.repeated(table.select([0, 1, 0])) == (0, 2, "1.png of 1 bytes")


def test_parquet_files_are_checked_as_others_are(tmp_path):
    official.picture(tmp_path / "0.png", form="PNG")
    rows = {"image": ["0.png", "gone.png", "0.png", "0.png", "0.png"], "phrase": ["x"] * 5, "question_id": [*"12344"],
            "box": [[1.0, 2, 9, 9], [1.0, 2, 9, 9], [9.0, 9, 4, 3], [0.1, 0.1, 0.5, 0.6], [1.0, 2, 9, 9]]}  # fmt: skip
    path = tmp_path / "a.parquet"
    Dataset.from_dict(rows).to_parquet(path)
    with pytest.raises(RowError, match="row 1: the picture '.*gone.png' is not there"):
        Files(path, path).load("grounding", "train")
    assert len(Files(path, path, on_error="skip").load("grounding", "train")) == 2
    for row, message in ((2, "left, top, right, bottom with an area"), (3, "less than a pixel")):
        Dataset.from_dict({k: [v[row]] for k, v in rows.items()}).to_parquet(path)
        with pytest.raises(RowError, match=message):
            Files(path, path).load("grounding", "train")
    Dataset.from_dict({"image": ["0.png"], "captions": [[]]}).cast(
        Features({"image": Value("string"), "captions": List(Value("string"))})
    ).to_parquet(path)
    with pytest.raises(RowError, match="expected 'captions' to hold at least one caption"):
        Files(path, path).load("retrieval", "train")
    Dataset.from_dict({"images": [["0.png", "0.png"]], "question": ["?"], "answer": ["a"]}).to_parquet(path)
    table = Files(path, path).load("answer", "train")
    assert table.features["images"] == List(Image()) and table[0]["images"][1].size == (40, 30)
