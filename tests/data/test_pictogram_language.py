"""What is said of scenes is true: captions, foils, questions and referring phrases."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import numpy as np
import pytest

from tests.data.scenes_read import NAMES, SIZE, direction, is_true, named, parse, some_scenes, things
from trimtab.data import pictograms
from trimtab.data.pictograms import language, scenes
from trimtab.data.pictograms.concepts import concepts

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def test_the_parser_of_these_tests_sees_what_is_wrong():
    """The tests of captions and foils stand on it."""
    dog, cat = (next(c for c in concepts() if c.name == n) for n in ("dog", "black cat"))
    scene = scenes.Scene(
        np.zeros((64, 64, 3), np.uint8), (scenes.Thing(dog, (0, 0, 9, 9)), scenes.Thing(cat, (40, 4, 60, 20)))
    )
    assert parse("there are two dogs, a tiger and three black cats") == {"dog": 2, "tiger": 1, "black cat": 3}
    for sentence, true in {
        "a dog left of a black cat": True, "a black cat left of a dog": False, "a dog above a black cat": False,
        "a picture of a dog and a black cat": True, "there are two dogs": False, "a tiger and a dog": False,
    }.items():  # fmt: skip
        assert is_true(sentence, scene) is true


# --- captions ---------------------------------------------------------------------------------------------------------


def test_a_place_in_a_caption_is_where_the_thing_stands():
    said = 0
    for scene in some_scenes("train"):
        for k in range(4):
            sentence = language.caption(scene, np.random.default_rng(k))
            for part in re.split(r", | and ", re.sub(r"^(a picture of|there is|there are) ", "", sentence)):
                if found := re.fullmatch(r"an? (.+) (?:at|in) the (.+)", part):
                    said += 1
                    assert language.place(named(scene, found[1]), len(scene.image)) == found[2], sentence
    assert said > 20


@pytest.mark.parametrize("split", ["train", "unseen-concepts"])
def test_captions_say_what_is_there(split):
    rng = np.random.default_rng(0)
    said = Counter()
    for scene in some_scenes(split):
        sentence = language.caption(scene, rng)
        content = parse(sentence)
        said[type(content)] += 1
        assert is_true(sentence, scene), sentence
        assert Counter(content[::2] if isinstance(content, tuple) else content) == things(scene), sentence
    assert said[tuple] > 20 and said[Counter] > 200


def test_foils_are_never_true():
    rng = np.random.default_rng(0)
    kinds = Counter()
    for scene in some_scenes():
        for _ in range(3):
            sentence = language.foil(scene, rng)
            assert not is_true(sentence, scene), f"{sentence}: true of {things(scene)}"
            content = parse(sentence)
            kinds[type(content)] += 1
            if isinstance(content, Counter):  # one thing's name is wrong, the rest is kept
                assert len(set(content) - set(things(scene))) == 1
                assert sorted(content.values()) == sorted(things(scene).values())
    assert kinds[tuple] > 10


def test_a_relation_is_said_only_where_it_is_plain():
    rng = np.random.default_rng(0)
    for scene in some_scenes():
        content = parse(language.caption(scene, rng))
        if isinstance(content, tuple):
            a, b = named(scene, content[0]), named(scene, content[2])
            near, far = sorted(abs(p - q) / SIZE for p, q in zip(a.centre, b.centre, strict=True))
            assert far >= 0.1 and far - near >= 0.05


@pytest.mark.parametrize(
    ("noun", "one", "many"),
    [
        ("dog", "a dog", "dogs"), ("ant", "an ant", "ants"), ("green apple", "a green apple", "green apples"),
        ("orange book", "an orange book", "orange books"), ("butterfly", "a butterfly", "butterflies"),
        ("key", "a key", "keys"), ("torch", "a torch", "torches"), ("box", "a box", "boxes"),
        ("compass", "a compass", "compasses"), ("unicorn", "a unicorn", "unicorns"),
        ("hourglass", "an hourglass", "hourglasses"), ("tomato", "a tomato", "tomatoes"), ("jeans", "a jeans", "jeans"),
    ],
)  # fmt: skip
def test_articles_and_plurals(noun, one, many):
    assert (language.article(noun), language.plural(noun)) == (one, many)


# --- questions --------------------------------------------------------------------------------------------------------


@cache
def asked() -> tuple[tuple[scenes.Scene, language.Question], ...]:
    rng = np.random.default_rng(0)
    return tuple((s, q) for s in some_scenes() for q in language.questions(s, rng))


def of_kind(kind: str) -> list[tuple[scenes.Scene, language.Question]]:
    found = [(s, q) for s, q in asked() if q.kind == kind]
    assert len(found) > 8, f"hardly any question of kind {kind!r}"
    return found


def test_every_kind_is_asked_at_most_once_a_scene_and_answers_are_classes():
    classes = pictograms.answers()
    assert len(set(classes)) == len(classes)
    assert {q.answer for _, q in asked()} <= set(classes)
    assert {q.kind for _, q in asked()} == set(language.QUESTION_KINDS)
    assert max(Counter((id(s), q.kind) for s, q in asked()).values()) == 1


@pytest.mark.parametrize("kind", ["is there", "relation"])
def test_yes_and_no_are_balanced(kind):
    answers = Counter(q.answer for _, q in of_kind(kind))
    assert set(answers) == {"yes", "no"}
    assert 0.4 <= answers["yes"] / answers.total() <= 0.6


def test_is_there():
    for scene, q in of_kind("is there"):
        name = re.fullmatch(r"is there an? (.+)\?", q.text)[1]
        assert name in NAMES and q.answer == ("yes" if name in things(scene) else "no")


def test_how_many():
    for scene, q in of_kind("how many"):
        noun = re.fullmatch(r"how many (.+) are there\?", q.text)[1]
        number = len(scene.things) if noun == "things" else things(scene)[parse(f"two {noun}").popitem()[0]]
        assert q.answer == str(number)


def test_relation_answers_agree_with_the_boxes():
    for scene, q in of_kind("relation"):
        a, where, b = re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", q.text).groups()
        true = direction(named(scene, a), named(scene, b))
        assert true == (where if q.answer == "yes" else OPPOSITE[where])


def test_which_names_the_only_thing_there():
    for scene, q in of_kind("which"):
        where, b = re.fullmatch(r"what is (left of|right of|above|below) the (.+)\?", q.text).groups()
        there = [t.concept.name for t in scene.things if t.concept.name != b and direction(t, named(scene, b)) == where]
        assert there == [q.answer]


def test_where():
    for scene, q in of_kind("where"):
        x, y = (c / SIZE for c in named(scene, re.fullmatch(r"where is the (.+)\?", q.text)[1]).centre)
        if q.answer == "centre":
            assert max(abs(x - 0.5), abs(y - 0.5)) < 0.15
        else:
            vertical, horizontal = q.answer.split()
            assert (y < 0.5) == (vertical == "top") and (x < 0.5) == (horizontal == "left")


def test_colour_and_what():
    for scene, q in of_kind("colour"):
        noun = re.fullmatch(r"what colour is the (.+)\?", q.text)[1]
        assert [t.concept.name for t in scene.things if t.concept.noun == noun] == [f"{q.answer} {noun}"]
    for scene, q in of_kind("what"):
        assert dict(things(scene)) == {q.answer: 1}


# --- referring phrases ------------------------------------------------------------------------------------------------


def test_a_phrase_means_one_thing():
    rng = np.random.default_rng(0)
    kinds = Counter()
    for scene in some_scenes():
        found = language.phrases(scene, rng)
        assert len({phrase for phrase, _ in found}) == len(found)
        for phrase, box in found:
            (meant,) = (t for t in scene.things if t.box == box)
            if related := re.fullmatch(r"the thing (left of|right of|above|below) the (.+)", phrase):
                kinds["relation"] += 1
                anchor = named(scene, related[2])
                there = [t for t in scene.things if t is not anchor and direction(t, anchor) == related[1]]
                assert there == [meant], phrase
            elif phrase.removeprefix("the ") in NAMES:
                kinds["name"] += 1
                assert phrase == f"the {meant.concept.name}" and things(scene)[meant.concept.name] == 1
            else:
                kinds["side"] += 1
                side, name = re.fullmatch(r"the (left|right|top|bottom) (.+)", phrase).groups()
                axis, sign = (side in ("top", "bottom")), (1 if side in ("left", "top") else -1)
                equal = sorted((t for t in scene.things if t.concept.name == name), key=lambda t: sign * t.centre[axis])
                assert len(equal) > 1 and equal[0] is meant, phrase
    assert min(kinds[k] for k in ("relation", "name", "side")) > 20
