"""Sets that are read one row after another: the rows of tables, in a seeded order, from any place on."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Image, load_dataset
from transformers import TrainerCallback

from tests import forked
from tests.tasks import tiny
from trimtab.data import streams
from trimtab.data.formats.users import Datasets, Files
from trimtab.data.images import ImageError, decode, encoded
from trimtab.data.reading import DataError
from trimtab.data.streams import Part, Streamed, numbered
from trimtab.experiments import many, training
from trimtab.experiments.collation import table_print
from trimtab.experiments.schema import TrainingSpec
from trimtab.tasks import TASKS, TaskModel

ROWS = 22
SPEC = TrainingSpec(steps=8, batch_size=4, learning_rate=1e-3, log_every=1, workers=0, buffer=6)


def png(i: int) -> bytes:
    content = io.BytesIO()
    tiny.picture(list(tiny.COLOURS)[i % 3], (20, 16 + i)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The same rows as two Parquet files with pictures in them, and as JSON lines beside picture files."""
    folder = tmp_path_factory.mktemp("streams")
    rows = [{"image": {"bytes": png(i), "path": f"{i}.png"}, "text": [f"the {tiny.WORDS[i % 18]}", f"one {i}"]}
            for i in range(ROWS)]  # fmt: skip
    (folder / "parquet").mkdir()
    for name, some in (("train-0", rows[:13]), ("train-1", rows[13:]), ("test", rows[:3])):
        columns = {k: [row[k] for row in some] for k in ("image", "text")}
        Dataset.from_dict(columns).cast_column("image", Image()).to_parquet(folder / "parquet" / f"{name}.parquet")
    for i, row in enumerate(rows):
        (folder / f"{i}.png").write_bytes(row["image"]["bytes"])
    lines = [json.dumps({"image": f"{i}.png", "text": row["text"]}) + "\n" for i, row in enumerate(rows)]
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


def parquet(root, **settings):
    return Datasets(root=root / "parquet", columns={"captions": "text"}, **settings).load("retrieval", "train")


def lines(root, name="train.jsonl", **settings):
    source = Files(train=root / name, test=root / "train.jsonl", columns={"captions": "text"}, **settings)
    return source.load("retrieval", "train")


@pytest.mark.parametrize("load", [parquet, lines])
def test_rows_are_those_that_are_read_into_memory(root, load):
    held, left = encoded(load(root)), load(root, stream=True).with_window(4)
    assert isinstance(left, Streamed) and len(left) == len(held) == ROWS and left["captions"] == held["captions"][:]
    for i in (0, 5, 3, 12, 13, ROWS - 1, -1, 1):  # back and forth, over the ends of windows and files
        assert left[i]["captions"] == held[i]["captions"]
        assert decode(left[i]["image"]).tobytes() == decode(held[i]["image"]).tobytes()


def test_an_order_mixes_windows_and_reads_them_once(root, monkeypatch):
    table = parquet(root, stream=True).with_window(5)
    first, second = table.order(0, 0), table.order(0, 1)
    assert sorted(first) == sorted(second) == list(range(ROWS)) and first == table.order(0, 0)
    assert first != second and table.order(1, 0) != first
    ends = {0: 13, 13: ROWS}
    for order in (first, second):
        begin = 0 if order[0] < 13 else 13
        assert all(begin <= i < ends[begin] for i in order[: ends[begin] - begin]), "files stay together"
    assert [sorted(first)[i : i + 5] for i in (0,)] == [list(range(5))]
    asked = []
    original = Streamed._read
    monkeypatch.setattr(Streamed, "_read", lambda self, *at: asked.append(at) or original(self, *at))
    assert [table[i]["captions"][1] for i in first] == [f"one {i}" for i in first]
    assert len(asked) == 5, "three windows of one file, two of the other"


def model_of() -> TaskModel:
    torch.manual_seed(0)
    return TaskModel(tiny.clip(), TASKS["retrieval"](captions="first"))


def fitted(table, folder=None, callbacks=(), **changes):
    model = model_of()
    history = training.fit(model, table, replace(SPEC, **changes), 3, list(callbacks), checkpoints=folder)
    return [entry["loss"] for entry in history], model.state_dict()


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(root):
    return fitted(parquet(root, stream=True))


def same(one, two) -> bool:
    return one[0] == two[0] and all(torch.equal(one[1][k], v) for k, v in two[1].items())


def test_workers_and_files_of_another_kind_change_no_number(root, whole):
    """The rows of one file instead of two come in another order: that the losses are compared is seen there."""
    assert len(set(whole[0])) == 8
    assert same(fitted(parquet(root, stream=True), workers=2), whole)
    one = fitted(lines(root, stream=True))
    assert one[0] != whole[0] and same(fitted(lines(root, stream=True), workers=1), one)


def test_a_resumed_training_begins_in_the_middle_of_the_stream(root, whole, tmp_path, monkeypatch):
    asked = []
    original = Streamed._read
    monkeypatch.setattr(Streamed, "_read", lambda self, *at: asked.append(at) or original(self, *at))
    with pytest.raises(KeyboardInterrupt):
        fitted(parquet(root, stream=True), tmp_path, [StopAt()], save_every=3)
    first = list(asked)
    asked.clear()
    assert same(fitted(parquet(root, stream=True), tmp_path, save_every=3), whole)
    assert asked and asked[0] in first[1:] and first[0] != asked[0], "windows that were trained on are passed over"


def test_a_stream_of_ones_own_is_trained_on(root, whole):
    names = [str(root / "parquet" / f"train-{i}.parquet") for i in range(2)]
    own = load_dataset("parquet", data_files=names, split="train", streaming=True).rename_column("text", "captions")
    assert len(numbered(own)) == ROWS
    undecoded = own.cast_column("image", Image(decode=False))
    assert fitted(own)[0] == fitted(Streamed([Part(lambda: undecoded, ROWS, "own")]))[0]
    with pytest.raises(TypeError, match=r"expected a table of `datasets` .* found generator"):
        fitted(row for row in own)


def test_two_processes_train_as_one(root, whole, tmp_path):
    def work() -> None:
        many.join()
        losses = fitted(parquet(root, stream=True))[0]
        if many.is_first():
            (tmp_path / "losses").write_text(json.dumps(losses))

    forked.together(work, tmp_path)
    assert json.loads((tmp_path / "losses").read_text()) == pytest.approx(whole[0], rel=1e-4)


def test_what_cannot_be_streamed_is_told(root, tmp_path):
    for settings in ({"on_error": "skip"}, {"drop_bad_images": True}):
        with pytest.raises(DataError, match="none can be left out: leave out on_error and drop_bad_images"):
            lines(root, stream=True, **settings)
    with pytest.raises(DataError, match="held_out: no rows can be held out of a stream"):
        lines(root, stream=True, held_out=0.1)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: there is no such file"):
        lines(root, "nowhere.jsonl", stream=True)
    (tmp_path / "anywhere").mkdir()
    with pytest.raises(DataError, match=r"anywhere: expected files that end in .*, found none: leave it out"):
        lines(tmp_path, "anywhere", stream=True)
    with pytest.raises(DataError, match=r"0\.png: expected a file that ends in \.parquet, \.jsonl, .* for `stream"):
        lines(root, "0.png", stream=True)


def test_faults_of_rows_and_files_are_named(root, tmp_path):
    text = (root / "train.jsonl").read_text().splitlines()
    for name, bad, error, message in (
        ("picture.jsonl", {"image": "gone.png", "text": ["a"]}, ImageError, r"gone\.png: cannot be decoded"),
        ("field.jsonl", {"image": "0.png", "text": []}, DataError, r"field\.jsonl, row 2: expected 'captions' to hold"),
    ):
        (root / name).write_text("\n".join([*text[:2], json.dumps(bad)]))
        for workers in (0, 1):
            with pytest.raises(error, match=message):
                fitted(lines(root, name, stream=True), batch_size=3, steps=1, workers=workers)
    (root / "short.jsonl").write_text("\n".join(text[:3]))
    table = lines(root, "short.jsonl", stream=True)
    (root / "short.jsonl").write_text("\n".join(text[:2]))
    with pytest.raises(DataError, match=r"short\.jsonl: expected 3 rows, as were counted at the start, found 2"):
        table[2]
    (root / "broken.parquet").write_bytes((root / "parquet" / "train-0.parquet").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"broken\.parquet: cannot be read"):
        lines(root, "broken.parquet", stream=True)
    (root / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"none\.jsonl: holds no rows"):
        lines(root, "none.jsonl", stream=True)


def test_the_window_is_what_is_held(root):
    assert streams.numbered(parquet(root, stream=True), 7).window == 7
    assert streams.numbered(parquet(root, stream=True)).window == streams.WINDOW


def test_words_that_look_like_dates_stay_words(root):
    rows = [{"image": f"{i}.png", "text": [text]} for i, text in enumerate(("2001-01-01", "2002-02-02 10:00:00"))]
    (root / "dates.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert lines(root, "dates.jsonl", stream=True)["captions"] == [row["text"] for row in rows]
    (root / "list.jsonl").write_text("[1, 2]\n")
    with pytest.raises(DataError, match=r"list\.jsonl: cannot be read .* expected a JSON object a line"):
        lines(root, "list.jsonl", stream=True)[0]


def beside(root, **settings):
    """Rows of a Parquet file whose pictures are files beside it."""
    rows = {"image": [f"{i}.png" for i in range(9)], "text": [[f"picture {i}"] for i in range(9)]}
    Dataset.from_dict(rows).to_parquet(root / "beside.parquet")
    os.utime(root / "beside.parquet", (1, 1))
    return lines(root, "beside.parquet", **settings)


def with_words_alone(root, stream):
    """Lines of which only the fifth has a picture."""
    rows = [{"statement": f"row {i}", "images": ["4.png"] * (i == 4)} for i in range(9)]
    (root / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    os.utime(root / "some.jsonl", (1, 1))
    return streams.files([root / "some.jsonl"], {}, root, {"images"})


def test_files_are_not_kept_open(root):
    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    one = streams.files([root / "parquet" / "train-0.parquet"], {"captions": "text"}, root, set())
    before = count()
    several = streams.files([root / "parquet" / f"train-{i}.parquet" for i in (0, 1, 0, 1, 0)], {"captions": "text"},
                            root, set())  # fmt: skip
    assert count() == before and len(several) == 57 and len(one) == 13


def test_pictures_in_a_parquet_file_are_not_read_to_see_whether_they_are_files(root, monkeypatch):
    assert streams._holds_bytes(root / "parquet" / "train-0.parquet")
    beside(root, stream=True)
    assert not streams._holds_bytes(root / "beside.parquet")
    monkeypatch.setattr(streams, "_pictures", lambda *_: pytest.fail("rows were read"))
    parquet(root, stream=True)


@pytest.mark.parametrize("load", [lines, beside, with_words_alone])
def test_other_pictures_beside_the_same_rows_are_other_data(root, load):
    before = table_print(load(root, stream=True))
    assert before == table_print(load(root, stream=True))
    picture = (root / "4.png").read_bytes()
    try:
        (root / "4.png").write_bytes(png(5))
        assert table_print(load(root, stream=True)) != before
    finally:
        (root / "4.png").write_bytes(picture)
