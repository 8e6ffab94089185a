from __future__ import annotations

import json
import re

import pytest

from tests.data import official
from trimtab import cli
from trimtab.data import check, shown
from trimtab.data.base import ASKED, CAPTIONED, GROUNDED, NEEDED, SOURCES, Published
from trimtab.data.reading import DataError
from trimtab.settings import from_texts


@pytest.fixture
def refs(tmp_path):
    refs = [official.ref(1, "train", ["the dog"]), official.ref(2, "val", ["gone"], ann_id=9)]
    return official.refer(tmp_path / "data", refs, {101: [5, 5, 20, 10]})


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        official.picture(tmp_path / "own" / "train" / f"{i}.png", colour="red", form="PNG")
    rows = [{"file_name": f"{i}.png", "text": f"words {i}"} for i in range(4)]
    path = tmp_path / "own" / "train" / "metadata.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "own"


def test_a_published_set_is_known_by_its_files(refs):
    (found,) = check.check(refs)
    assert (found.source, found.settings, found.tasks) == ("refcoco", {"form": "refer"}, GROUNDED)
    rows = {s.name: (s.rows, len(s.left_out), s.missing) for s in found.splits}
    assert rows == {
        "train": (1, 0, ""),
        "val": (0, 1, ""),
        "test": (0, 0, ""),
        "testA": (0, 0, ""),
        "testB": (0, 0, ""),
    }
    assert "ref [1]: its annotation 9 is not in" in found.splits[1].left_out[0]
    assert [s["phrase"] for s in found.samples] == ["the dog"] and "box" in found.columns


def test_a_missing_picture_and_a_broken_one_are_told(refs):
    picture = next((refs / "train2014").iterdir())
    picture.write_bytes(b"<html>")
    (found,) = check.check(refs)
    assert found.splits[0].rows == 1  # there, as far as its name tells
    assert "cannot be decoded as an image" in check.check(refs, decode=True)[0].splits[0].left_out[0]
    assert shown.pictures(found.samples[0])[1].startswith(str(picture))
    picture.unlink()
    (found,) = check.check(refs)
    assert found.splits[0].rows == 0 and "is not there; looked in" in found.splits[0].left_out[0]


def test_own_files_serve_what_their_columns_allow(folder):
    (found,) = check.check(folder)
    assert (found.source, found.tasks, len(found.samples)) == ("imagefolder", (), 3)
    assert found.lacking["captioning"] == ("captions",) and found.lacking["vqa"] == ("question", "answer")
    (named,) = check.check(folder, settings={"columns": {"captions": "text"}})
    assert set(named.tasks) == set(CAPTIONED) and [s.rows for s in named.splits] == [4]
    (one,) = check.check(folder / "train")
    assert one.source == "files" and one.splits[0].rows == 4


def test_a_stream_is_counted_as_far_as_it_is_read(tmp_path, capsys):
    official.shard(tmp_path / "a.tar", {str(i): {"jpg": official.jpeg(), "txt": b"words"} for i in range(4)})
    assert [(s.rows, s.more) for s in check.check(tmp_path)[0].splits] == [(4, False)]
    assert cli.main(["data", "check", str(tmp_path), "rows=3"]) == 0
    assert "train: 3 rows, or more: reading stopped at the setting rows" in capsys.readouterr().out


def test_a_tsv_of_addresses_lacks_its_pictures(tmp_path):
    (tmp_path / "a.tsv").write_text("a dog\thttp://x/1\n")
    (found,) = check.check(tmp_path / "a.tsv")
    assert found.splits[0].rows == 1 and "without pictures" in found.splits[0].missing


def test_what_is_no_data(tmp_path, refs):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: expected data in a form that a reader knows, found none"):
        check.check(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        check.check(tmp_path / "gone")
    with pytest.raises(ValueError, match="unknown data source 'refcok': did you mean 'refcoco"):
        check.check(refs, "refcok")
    with pytest.raises(ValueError, match="data 'refcoco': unknown setting 'from'"):
        check.check(refs, "refcoco", {"from": "mdetr"})


def test_every_task_of_a_published_set_has_its_columns_written_down():
    tasks = {task for cls in SOURCES._items.values() if issubclass(cls, Published) for task in cls.tasks}
    assert tasks <= set(NEEDED) and set(ASKED) <= set(NEEDED)


def test_the_command_tells_and_writes_a_page(refs, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["data", "check", str(refs), "--picture", str(page)]) == 0
    told = capsys.readouterr().out
    assert "refcoco, form: refer" in told and "train: 1 rows" in told and "val: 0 rows, 1 rows cannot be used" in told
    assert "phrase: the dog" in told and len(re.findall(r"^[ .:=+*#%@-]{36}$", told, re.M)) >= 10  # the picture
    content = page.read_text()
    assert content.count("<img ") == 1 and "data:image/png;base64," in content and "the dog" in content


def test_the_command_takes_settings(folder, capsys):
    assert cli.main(["data", "check", str(folder), "columns.captions=text"]) == 0
    assert "tasks: retrieval" in capsys.readouterr().out
    assert cli.main(["data", "check", str(folder / "gone")]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err


def test_settings_from_texts():
    found = from_texts(["form=mdetr", "columns.captions=text", "columns.image=file", "test=[val, testA]"])
    wanted = {"form": "mdetr", "columns": {"captions": "text", "image": "file"}, "test": ["val", "testA"]}
    assert found == wanted
    for text, message in (("form", "expected key=value"), ("a=1", "'a.b=2': 'a' has a value"), ("=1", "expected key=")):
        with pytest.raises(ValueError, match=message):
            from_texts([text, "a.b=2"])


def test_a_drawn_picture_has_its_light_and_its_box():
    from PIL import Image

    picture = Image.new("RGB", (40, 40))
    picture.paste((255, 255, 255), (20, 0, 40, 40))
    lines = shown.drawn(picture, 10).plain.splitlines()
    assert lines == ["     @@@@@"] * 5
    assert shown.boxed(picture, [2, 3, 12, 13]).getpixel((2, 3)) == (255, 0, 255) != picture.getpixel((2, 3))


def test_words_of_a_page_are_escaped():
    row = {"image": None, "phrase": "<script>", "captions": ["a\nb", "c"], "empty": ""}
    assert dict(shown.words(row)) == {"image": "none", "phrase": "<script>", "captions": "a\\nb | c"}
    assert "<script>" not in shown.page([("x", row)], "t") and "&lt;script&gt;" in shown.page([("x", row)], "t")
