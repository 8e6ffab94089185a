"""What all readers share: files with errors that name file and row, rows that are left out, pictures."""

from __future__ import annotations

import pytest

from tests.data.made_sets import picture, write
from trimtab.data.base import COLUMNS, features
from trimtab.data.reading import (
    DataError,
    Entry,
    Kept,
    Pictures,
    RowError,
    csv_rows,
    find_file,
    json_lines,
    read_json,
    text_lines,
)


def test_csv_cells_may_hold_commas_and_line_ends(tmp_path):
    path = write(tmp_path / "a.csv", 'id,text\n1,"one, two"\n2,"a\nb"\n\n3\n4,last\n')
    entries = list(csv_rows(path, ["text"]))
    assert [e.row for e in entries] == ["line 2", "line 4", "line 6", "line 7"]
    assert [entries[i].text("text") for i in (0, 1, 3)] == ["one, two", "a\nb", "last"]
    with pytest.raises(RowError, match=r"a\.csv, line 6: expected 2 cells, found 1"):
        entries[2].text("text")
    with pytest.raises(DataError, match=r"a\.csv, line 1: expected a header with 'sentence', found \['id', 'text'\]"):
        next(csv_rows(path, ["sentence"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('id,text\n1,"one\n2,two\n', "a.csv, line 3: not CSV"),
        ("id,text,text\n", "line 1: the column 'text' stands twice"),
    ],
)
def test_a_csv_of_which_a_part_would_be_lost_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        list(csv_rows(write(tmp_path / "a.csv", text), []))


def test_lines_keep_their_numbers_and_lose_their_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\r\nthree \r\n".encode())
    assert list(text_lines(path)) == [(1, "one"), (2, ""), (3, "three ")]
    path.write_bytes(b'{"a": "\xe2\x80\xa8"}\n\n{"a": "2"}')  # a line separator within a text ends no line
    assert [(e.row, e.text("a", empty=True)) for e in json_lines(path)] == [("line 1", "\u2028"), ("line 3", "2")]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt: expected text in UTF-8"):
        list(text_lines(path))
    with pytest.raises(DataError, match=r"gone\.txt: there is no such file"):
        list(text_lines(tmp_path / "gone.txt"))
    with pytest.raises(DataError, match="cannot be read"):
        list(text_lines(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": [1, 2', r"line 1, column \d+: the file seems to be cut off: expected JSON"),
        ('{"a": "b', r"the file seems to be cut off"),
        ('{"a": 1,\n nonsense}', r"line 2, column 2: expected JSON"),
        ("", r"the file seems to be cut off"),
    ],
)
def test_json_that_is_cut_off_or_wrong(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_json(write(tmp_path / "a.json", text))


def test_fields_are_checked(tmp_path):
    entry = Entry({"text": " ", "flag": True, "list": ["a", 1], "number": 7, "id": "007"}, tmp_path / "f", "line 3")
    assert entry.number("number") == 7 and entry.id("number") == "7" and entry.id("id") == "007"
    for call, message in (
        (lambda: entry.text("text"), r"f, line 3: expected 'text' to hold words, found ' '"),
        (lambda: entry.number("flag"), r"expected 'flag' to be a whole number, found True"),
        (lambda: entry.texts("list"), r"expected 'list' to be a list of strings"),
        (lambda: entry.get("gone"), r"expected the field 'gone', found 'text', 'flag'"),
        (lambda: entry.part("number"), r"expected 'number' to be an object, found 7"),
        (lambda: entry.one_of("id", ["017"]), r"'id': unknown value '007': did you mean '017'"),
    ):
        with pytest.raises(RowError, match=message):
            call()


def test_rows_become_one_table_whatever_their_number(monkeypatch):
    monkeypatch.setattr(Kept, "CHUNK", 2)
    kept = Kept()
    for i in range(5):
        kept.add(question=f"q{i}", answers=[str(i)] * i, box=[0.0, 1.0, 2.0, 3.0])
    table = kept.table("five")
    assert len(kept) == len(table) == 5 and table["question"][:] == [f"q{i}" for i in range(5)]
    assert table["answers"][3] == ["3"] * 3 and table["answers"][0] == []
    with pytest.raises(DataError, match="none: holds no rows"):
        Kept().table("none")


def test_every_column_has_a_type():
    assert set(features(COLUMNS)) == set(COLUMNS)
    with pytest.raises(ValueError, match="unknown column 'imge': did you mean 'image'"):
        features(["imge"])


def test_a_file_is_looked_for_from_the_top(tmp_path):
    write(tmp_path / "a/b/x.json", "1")
    assert find_file(tmp_path, "y.json", "x.json") == tmp_path / "a/b/x.json"
    write(tmp_path / "c/d/x.json", "2")
    with pytest.raises(DataError, match="which is meant"):
        find_file(tmp_path, "x.json")
    write(tmp_path / "c/x.json", "3")
    assert find_file(tmp_path, "x.json") == tmp_path / "c/x.json"
    with pytest.raises(DataError, match=r"expected z\.json in it or in a folder below, found none"):
        find_file(tmp_path, "z.json")


def test_pictures_are_files_in_one_of_the_folders(tmp_path):
    picture(tmp_path / "b/sub/1.jpg")
    (tmp_path / "a/sub/2.jpg").mkdir(parents=True)
    pictures, entry = Pictures(tmp_path / "a", tmp_path / "b"), Entry({}, tmp_path / "f", "line 1")
    assert pictures(entry, "sub/1.jpg") == {"path": str(tmp_path / "b/sub/1.jpg"), "bytes": None}
    with pytest.raises(RowError, match=r"f, line 1: the picture 'sub/2\.jpg' is not there; looked in .*a, .*b"):
        pictures(entry, "sub/2.jpg")  # a folder of that name is no picture
