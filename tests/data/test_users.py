from __future__ import annotations

import json
import logging

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from tests.data import official
from trimtab.data import tables
from trimtab.data.formats.users import Datasets, Files, ImageFolder
from trimtab.data.reading import DataError, RowError


@pytest.fixture
def folder(tmp_path):
    for i, colour in enumerate(("red", "blue", "green")):
        official.picture(tmp_path / "pictures" / f"{i}.png", colour=colour, form="PNG")
    return tmp_path


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_csv_with_a_map_of_columns(folder):
    (folder / "a.csv").write_text(
        'file,text,where\npictures/0.png,"a, b","[1, 2, 3.5, 4]"\npictures/1.png,c,"[0,0,1,1]"\n'
    )
    source = Files(folder / "a.csv", folder / "a.csv", columns={"image": "file", "phrase": "text", "box": "where"})
    table = source.load("grounding", "train")
    assert table["phrase"][:] == ["a, b", "c"] and table["box"][:] == [[1, 2, 3.5, 4], [0, 0, 1, 1]]
    assert table[1]["image"].getpixel((0, 0)) == official.COLOURS["blue"]
    with pytest.raises(DataError, match="the column map: unknown column 'fraze': did you mean .*'phrase'"):
        Files(folder / "a.csv", folder / "a.csv", columns={"fraze": "text"}).load("grounding", "train")
    with pytest.raises(RowError, match=r"a.csv, line 2: expected the field 'txt' \(for 'phrase'\), found 'file'"):
        Files(folder / "a.csv", folder / "a.csv", columns={"phrase": "txt"}).load("grounding", "train")


def test_json_lists_and_pictures_in_another_folder(folder):
    rows = [{"image": "0.png", "captions": "one"}, {"image": "1.png", "captions": ["one", "two"], "more": {"a": None}}]
    (folder / "below").mkdir()
    (folder / "below" / "rows.json").write_text(json.dumps(rows))
    source = Files(folder / "below" / "rows.json", folder / "gone.json", pictures=folder / "pictures")
    table = source.load("retrieval", "train")
    assert table["captions"][:] == [["one"], ["one", "two"]] and set(table.column_names) == {
        "image",
        "captions",
        "more",
    }
    with pytest.raises(FileNotFoundError, match=r"gone.json: there is no such file"):
        source.load("retrieval", "test")


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("vqa", {"image": "gone.png"}, r"the picture 'gone.png' is not there; looked in"),
        ("vqa", {"image": "pictures/0.png", "answer": True}, r"expected 'answer' to be a string, found 'True'"),
        (
            "grounding",
            {"image": "pictures/0.png", "box": [40, 0, 50, 9]},
            r"in its picture of 40 x 30 pixels, found \[40",
        ),
        ("grounding", {"image": "pictures/0.png", "box": [5, 5, 5, 9]}, r"left, top, right, bottom with an area"),
        ("vqa", {"image": "pictures/0.png", "question_id": 1}, r"the question_id '1' stands twice"),
        ("vqa", {"video": "gone.mp4"}, r"the video 'gone.mp4' is not there"),
        ("vqa", {"question": "?"}, r"expected the field 'image' \(or images, video, messages\).*columns.image=file"),
        (
            "retrieval",
            {"image": "pictures/0.png", "captions": [1.5]},
            r"expected 'captions' to be a string, found '1.5'",
        ),
        (
            "retrieval",
            {"image": "pictures/0.png", "captions": []},
            r"'captions' to hold at least one caption, found \[\]",
        ),
        ("captioning", {"image": "pictures/0.png", "captions": [" "]}, r"to hold at least one caption, found \[' '\]"),
    ],
)
def test_a_bad_row_is_named_or_left_out(folder, task, row, message, caplog):
    path = lines(folder / "a.jsonl", {"image": "pictures/0.png", "question_id": 1}, {}, row)
    path.write_text(path.read_text().replace("{}\n", "\n"))  # blank lines count, and say nothing
    with pytest.raises(RowError, match=rf"a\.jsonl, line 3: .*{message}"):
        Files(path, path).load(task, "train")
    with caplog.at_level(logging.WARNING):
        assert len(Files(path, path, on_error="skip").load(task, "train")) == 1
    assert "left out 1, kept 1 rows" in caplog.text and "line 3" in caplog.text


def test_a_picture_that_cannot_be_decoded_is_left_out_on_skip(folder):
    (folder / "pictures" / "1.png").write_text("<html>")
    path = lines(folder / "a.jsonl", *({"image": f"pictures/{i}.png"} for i in range(3)))
    assert len(Files(path, path, on_error="skip").load("vqa", "train")) == 2
    assert len(Files(path, path).load("vqa", "train")) == 3  # decoded when it is needed, as ever


def test_values_of_different_kinds_in_a_column_are_an_error(folder):
    path = lines(folder / "a.jsonl", {"image": "pictures/0.png", "x": 1}, {"image": "pictures/0.png", "x": "b"})
    with pytest.raises(DataError, match=r"a.jsonl: expected the column 'x' to hold values of one kind"):
        Files(path, path).load("vqa", "train")


def test_a_column_that_the_task_does_not_read_may_hold_anything(folder):
    row = {
        "image": "pictures/0.png",
        "captions": "a",
        "box": [[1, 2], [3, 4]],
        "group": ["x"],
        "label": 1.5,
        "image_id": 7,
    }
    path = lines(folder / "a.jsonl", row)
    found = Files(path, path).load("retrieval", "train")[0]
    assert found["box"] == [[1, 2], [3, 4]] and found["group"] == ["x"] and found["label"] == 1.5
    assert found["image_id"] == "7"
    with pytest.raises(RowError, match=r"line 1: expected 'box' to be numbers, found '\[1, 2\]'"):
        Files(path, path).load("grounding", "train")
    with pytest.raises(RowError, match=r"line 1: expected 'label' to be a string, found '1.5'"):
        Files(path, path).classes()


def test_an_unknown_kind_of_file(folder):
    (folder / "a.xml").write_text("<a/>")
    with pytest.raises(DataError, match=r"a.xml: expected a file that ends in .jsonl"):
        Files(folder / "a.xml", folder / "a.xml").load("vqa", "train")


# --- chats ------------------------------------------------------------------------------------------------------------


def said(role, *parts):
    return {"role": role, "content": list(parts)}


WORDS = {"type": "text", "text": "A cat."}


def test_rows_of_a_chat_give_messages_and_pictures(folder):
    named = {"messages": [said("user", {"type": "image", "path": "pictures/1.png"}, {"type": "text", "text": "What?"}),
                          said("assistant", WORDS)]}  # fmt: skip
    bare = {"messages": [{"role": "system", "content": "Be short."}, said("user", {"type": "image"}, {"type": "image"}),
                         said("assistant", WORDS)], "images": ["pictures/0.png", "pictures/2.png"]}  # fmt: skip
    table = Files(lines(folder / "a.jsonl", named, bare), folder / "a.jsonl").load("answer", "train")
    assert [m["role"] for m in table[1]["messages"]] == ["system", "user", "assistant"]
    assert table[0]["messages"][0]["content"] == [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    assert table[1]["messages"][0]["content"] == [{"type": "text", "text": "Be short."}]
    colours = [[p.getpixel((0, 0)) for p in row] for row in table["images"]]
    assert colours == [[official.COLOURS["blue"]], [official.COLOURS["red"], official.COLOURS["green"]]]
    assert table["answer"][:] == ["A cat.", "A cat."]


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ([said("user", {"type": "image"}), said("assistant", WORDS)], [], "a picture for each bare picture part"),
        ([said("user", WORDS), said("assistant", WORDS)], ["pictures/0.png"], "a picture part for each of the 1 pict"),
        ([said("user", WORDS)], [], "to end with words of the assistant, found 'user'"),
        ([said("assistant", {"type": "text", "text": " "})], [], "to end with words of the assistant"),
        ([said("robot", WORDS)], [], r"messages\[0\]: 'role': unknown value 'robot'"),
        ([said("user", {"type": "image", "url": "http://x/1.png"})], [], "found the address 'http://x/1.png'"),
        ([said("user", {"type": "sound"})], [], r"messages\[0\], content\[0\]: 'type': unknown value 'sound'"),
        ([said("user", {"type": "image", "path": "no.png"})], [], r"content\[0\]: the picture 'no.png' is not there"),
    ],
)
def test_a_chat_that_cannot_be_used_is_named(folder, messages, images, message):
    path = lines(folder / "a.jsonl", {"messages": messages, "images": images})
    with pytest.raises(RowError, match=rf"a\.jsonl, line 1.*{message}"):
        Files(path, path).load("answer", "train")


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def imagefolder(folder):
    """Rows in another order than the files, folders below, nested lists and nulls."""
    for split in ("train", "val", "test"):
        official.picture(folder / "set" / split / "below" / "b.png")
        official.picture(folder / "set" / split / "a.png", colour="blue")
        lines(folder / "set" / split / "metadata.jsonl",
              {"file_name": "below/b.png", "text": "b", "objects": {"bbox": [[1, 2, 3, 4]], "id": [None]}},
              {"file_name": "a.png", "text": "a", "who": None, "objects": {"bbox": [], "id": []}})  # fmt: skip
    return folder / "set"


def test_an_image_folder_with_metadata(imagefolder):
    source = ImageFolder(root=imagefolder, columns={"captions": "text"})
    table = source.load("retrieval", "train")
    assert table["captions"][:] == [["b"], ["a"]] and table[0]["objects"] == {"bbox": [[1, 2, 3, 4]], "id": [None]}
    assert [p.getpixel((0, 0))[2] > 100 for p in table["image"]] == [False, True]
    assert "val" in source.load("retrieval", "validation")[0]["image"].filename
    lines(imagefolder / "test" / "metadata.jsonl", {"file_name": "a.png", "text": "a"}, {"text": "no file name"})
    with pytest.raises(RowError, match=r"test/metadata.jsonl, line 2: expected the field 'file_name', found 'text'"):
        source.load("retrieval", "test")
    lines(imagefolder / "test" / "metadata.jsonl", {"file_name": "a.png", "text": None})
    with pytest.raises(RowError, match=r"line 1: expected the field 'text' \(for 'captions'\), found 'image'"):
        source.load("retrieval", "test")


def test_a_folder_of_pictures_a_class(folder):
    for name in ("cat/x.png", "dog/y.JPG"):
        official.picture(folder / "set" / "train" / name, form="PNG")
    source = ImageFolder(root=folder / "set")
    assert source.load("classification", "train")["label"][:] == ["cat", "dog"] == list(source.classes())
    with pytest.raises(
        DataError, match=r"set: expected a file or folder for 'test', found train; choose with data.test"
    ):
        source.load("classification", "test")


def test_two_folders_for_one_split_are_an_error(imagefolder):
    (imagefolder / "dev").mkdir()
    with pytest.raises(DataError, match="both stand for 'validation'; keep one"):
        tables.splits(imagefolder)


@pytest.fixture
def table(folder):
    columns = {
        "image": [str(folder / "pictures" / f"{i}.png") for i in range(3)],
        "text": list("abc"),
        "kind": [0, 1, 0],
    }
    types = Features({"image": Image(), "text": Value("string"), "kind": ClassLabel(names=["cat", "dog"])})
    return Dataset.from_dict(columns, features=types)


def test_what_datasets_saved(table, tmp_path):
    DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(tmp_path / "saved")
    source = Datasets(root=tmp_path / "saved", columns={"captions": "text", "label": "kind"})
    found = source.load("retrieval", "train")
    assert found["captions"][:] == [["a"], ["b"], ["c"]] and found["label"][:] == ["cat", "dog", "cat"]
    assert source.load("retrieval", "test")[0]["image"].getpixel((0, 0)) == official.COLOURS["green"]
    assert source.load("retrieval", "validation")["label"][:] == found["label"][:] and source.classes() == [
        "cat",
        "dog",
    ]
    with pytest.raises(DataError, match=r"train: unknown column 'txt': did you mean 'text'"):
        Datasets(root=tmp_path / "saved", columns={"captions": "txt"}).load("retrieval", "train")
    one = Files(tmp_path / "saved" / "train", tmp_path / "saved" / "test", columns={"label": "kind"})
    assert one.load("classification", "test")["label"][:] == ["cat"]


def test_parquet_files_of_a_hub_folder(table, tmp_path):
    for i in range(2):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        table.select([i]).to_parquet(tmp_path / "hub" / "data" / f"train-0000{i}-of-00002.parquet")
    table.select([2]).to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    source = Datasets(root=tmp_path / "hub", columns={"answer": "text"})
    assert source.load("vqa", "train")["answer"][:] == ["a", "b"] == list(source.answers())
    assert source.load("vqa", "test")[0]["image"].size == (40, 30)
    (tmp_path / "hub" / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"test-00000-of-00001.parquet: cannot be read"):
        source.load("vqa", "test")
