"""Statements about two pictures, true or false (as in NLVR2: Suhr et al., ACL 2019).

A number gives two pairs of pictures and two statements: each is true of one pair and false of the other. So neither
the statement alone nor the pictures alone say anything of the label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np

from trimtab.data.pictograms.kinds import KINDS, Kind, Rows, cell, value
from trimtab.data.pictograms.language import NUMBERS, article, plural
from trimtab.data.pictograms.scenes import Scene, World

Pair = tuple[Scene, Scene]
Statement = tuple[str, str, Callable[[Pair], bool]]  # its kind, its words, whether it is true


def count(scene: Scene, name: str | None = None) -> int:
    """How many things of that name a scene holds; of all if there is no name."""
    return sum(name in (None, t.concept.name) for t in scene.things)


def _compared(pair: Pair, sign: int) -> bool:
    """Whether the left picture holds more things (1), the right one does (-1), or both hold as many (0)."""
    difference = count(pair[0]) - count(pair[1])
    return (difference > 0) - (difference < 0) == sign


def _in_all(pair: Pair, number: int, name: str | None = None) -> bool:
    return sum(count(scene, name) for scene in pair) == number


def _shown(pair: Pair, name: str, left: bool | None, right: bool | None) -> bool:
    """Whether a thing is in the left picture, and in the right one; None asks nothing of a picture."""
    return all(w is None or (count(s, name) > 0) == w for s, w in zip(pair, (left, right), strict=True))


def _in_one(pair: Pair, name: str) -> bool:
    return (count(pair[0], name) > 0) != (count(pair[1], name) > 0)


def _statements(names: list[str], most: int) -> list[Statement]:
    """What can be said about two pictures in which these things may stand."""
    found: list[Statement] = [
        ("compare", "the left picture holds more things than the right one", partial(_compared, sign=1)),
        ("compare", "the right picture holds more things than the left one", partial(_compared, sign=-1)),
        ("compare", "the two pictures hold the same number of things", partial(_compared, sign=0)),
    ]
    found += [("total", f"there are {n} things in all", partial(_in_all, number=n)) for n in range(2, most + 1)]
    for x in names:
        a = article(x)
        found += [
            ("both", f"both pictures show {a}", partial(_shown, name=x, left=True, right=True)),
            ("none", f"neither picture shows {a}", partial(_shown, name=x, left=False, right=False)),
            ("left", f"{a} is in the left picture", partial(_shown, name=x, left=True, right=None)),
            ("right", f"{a} is in the right picture", partial(_shown, name=x, left=None, right=True)),
            ("one", f"only one of the pictures shows {a}", partial(_in_one, name=x)),
        ]
        found += [
            ("number", f"there are {NUMBERS[n]} {plural(x)} in all", partial(_in_all, number=n, name=x)) for n in (2, 3)
        ]
    return found


def _pair(world: World, rng: np.random.Generator) -> Pair:
    """Two pictures, which often hold a thing of the same name."""
    first = world.choose(rng)
    while True:
        second = world.choose(rng)
        if rng.random() < 0.6:
            second[int(rng.integers(len(second)))] = first[int(rng.integers(len(first)))]
        if world.allows(second) or world.split == "unseen-combinations":
            return world.draw(rng, first), world.draw(rng, second)


def rows(world: World, index: int) -> Rows:
    rng = world.rng(index, 3)
    one, two = _pair(world, rng), _pair(world, rng)
    held = Counter(t.concept.name for pair in (one, two) for scene in pair for t in scene.things)
    said = _statements(sorted(held), max(sum(len(s.things) for s in pair) for pair in (one, two)))
    chosen = [_of_one_kind([s for s in said if s[2](a) and not s[2](b)], rng) for a, b in ((one, two), (two, one))]
    if None in chosen:
        return []
    pictures = [[cell(scene.png()) for scene in pair] for pair in (one, two)]
    found = [
        {"images": pictures[k], "statement": statement[1], "label": "true" if statement[2](pair) else "false",
         "identifier": f"{world.split}-{index}-{k}-{i}", "kind": statement[0]}
        for i, statement in enumerate(s for s in chosen if s is not None) for k, pair in enumerate((one, two))
    ]  # fmt: skip
    return [found[i] for i in rng.permutation(len(found))]


def _of_one_kind(said: list[Statement], rng: np.random.Generator) -> Statement | None:
    """One of them, of each kind as often."""
    if not said:
        return None
    kinds = sorted({s[0] for s in said})
    kind = kinds[int(rng.integers(len(kinds)))]
    fitting = [s for s in said if s[0] == kind]
    return fitting[int(rng.integers(len(fitting)))]


def _features() -> dict:
    from datasets import Image, List

    return {"images": List(Image()), **{n: value("string") for n in ("statement", "label", "identifier", "kind")}}


KINDS.register("pairs")(Kind(rows, _features, whole=True))
