"""What can be said of a scene: captions, questions with answers, and phrases that refer to one thing.

Every sentence is true of its scene and, where it refers to one thing, fits no other. Wording varies with the random
generator that is passed in; the same generator state gives the same words.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from trimtab.data.pictograms.concepts import COLOURS, concepts
from trimtab.data.pictograms.scenes import Scene, Thing, another

NUMBERS = ("no", "one", "two", "three", "four")
DIRECTIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = ("top left", "top right", "bottom left", "bottom right", "centre")
QUESTION_KINDS = ("what", "how many", "where", "is there", "colour", "relation", "which")
FIXED_ANSWERS = ("yes", "no", "0", "1", "2", "3", "4", *PLACES)
_CLEAR = 0.12  # two centres must differ by this share of the scene's side before a direction is said of them


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    kind: str


def answers(count: int = 240) -> tuple[str, ...]:
    """Every answer that a question can have, in a fixed order: the classes of the VQA task."""
    return FIXED_ANSWERS + COLOURS + tuple(sorted(c.name for c in concepts(count)))


def article(noun: str) -> str:
    vowel = noun[0] in "aeiou" and not noun.startswith("uni")  # the first sound decides: a unicorn, an hourglass
    return f"{'an' if vowel or noun.startswith('hour') else 'a'} {noun}"


def plural(noun: str) -> str:
    if noun.endswith("s") and not noun.endswith("ss"):
        return noun  # "fireworks", "jeans": the name is a plural already
    if noun.endswith(("ss", "x", "ch", "sh", "tomato", "mango")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def relation(a: Thing, b: Thing, size: int) -> str | None:
    """Where `a` stands seen from `b` (`left of`, `right of`, `above`, `below`), None if neither axis decides it.

    The larger of the two offsets decides, so that "left of" never describes what is mostly above.
    """
    (ax, ay), (bx, by) = a.centre, b.centre
    dx, dy = (ax - bx) / size, (ay - by) / size
    if max(abs(dx), abs(dy)) < _CLEAR or abs(abs(dx) - abs(dy)) < _CLEAR / 2:
        return None
    if abs(dx) > abs(dy):
        return "right of" if dx > 0 else "left of"
    return "below" if dy > 0 else "above"


def place(thing: Thing, size: int) -> str | None:
    """The corner or the centre in which a thing stands, None where it is between them."""
    x, y = (c / size for c in thing.centre)
    if abs(x - 0.5) < 0.12 and abs(y - 0.5) < 0.12:
        return "centre"
    if abs(x - 0.5) < 0.08 or abs(y - 0.5) < 0.08:
        return None
    return f"{'top' if y < 0.5 else 'bottom'} {'left' if x < 0.5 else 'right'}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One sentence that names everything in the scene; for two single things often with their relation, else at times
    with the place of one."""
    return _sentence(_mentions(scene, rng), scene, rng)


def foil(scene: Scene, rng: np.random.Generator, count: int = 240) -> str:
    """A caption that is wrong in one point: one thing's name, or the direction between two things."""
    mentions = _mentions(scene, rng)
    present = {name for name, _ in mentions}
    k = int(rng.integers(len(mentions)))
    other = another(rng, present, scene.unseen, count)
    wrong = [(other, n) if i == k else (name, n) for i, (name, n) in enumerate(mentions)]
    related = _related(mentions, scene)
    if related and rng.random() < 0.25:
        return f"{article(mentions[0][0])} {DIRECTIONS[related]} {article(mentions[1][0])}"
    return _sentence(wrong, scene, rng)


def _mentions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, int]]:
    counts = Counter(t.concept.name for t in scene.things)
    names = list(counts)
    return [(names[i], counts[names[i]]) for i in rng.permutation(len(names))]


def _related(mentions: list[tuple[str, int]], scene: Scene) -> str | None:
    """The relation between the first two mentions, when the scene holds just those two things."""
    if len(mentions) != 2 or len(scene.things) != 2:
        return None
    by_name = {t.concept.name: t for t in scene.things}
    if not all(name in by_name for name, _ in mentions):
        return None
    return relation(by_name[mentions[0][0]], by_name[mentions[1][0]], len(scene.image))


def _sentence(mentions: list[tuple[str, int]], scene: Scene, rng: np.random.Generator) -> str:
    related = _related(mentions, scene)
    if related and rng.random() < 0.6:
        return f"{article(mentions[0][0])} {related} {article(mentions[1][0])}"
    parts = [article(name) if n == 1 else f"{NUMBERS[n]} {plural(name)}" for name, n in mentions]
    placed = {t.concept.name: place(t, len(scene.image)) for t in scene.things}
    k = int(rng.integers(len(parts)))
    name, n = mentions[k]
    if n == 1 and placed.get(name) and rng.random() < 0.5:
        parts[k] += f" {'in' if placed[name] == 'centre' else 'at'} the {placed[name]}"
    start = ("", "a picture of ", "there is " if mentions[0][1] == 1 else "there are ")[int(rng.integers(3))]
    return start + (parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}")


def questions(scene: Scene, rng: np.random.Generator, count: int = 240) -> list[Question]:
    """Every kind of question that the scene allows, one each (see `QUESTION_KINDS`), in random order."""
    size = len(scene.image)
    counts = Counter(t.concept.name for t in scene.things)
    single = [t for t in scene.things if counts[t.concept.name] == 1]
    asked = [_how_many(scene, counts, rng), _is_there(scene, counts, rng, count)]
    if len(scene.things) == 1:
        asked.append(Question("what is in the picture?", scene.things[0].concept.name, "what"))
    for thing in single:
        if (where := place(thing, size)) is not None:
            asked.append(Question(f"where is the {thing.concept.name}?", where, "where"))
        nouns = [t.concept.noun for t in scene.things]
        if thing.concept.colour and nouns.count(thing.concept.noun) == 1:
            asked.append(Question(f"what colour is the {thing.concept.noun}?", thing.concept.colour, "colour"))
    asked += _relations(scene, single, rng)
    best: dict[str, Question] = {}
    for i in rng.permutation(len(asked)):
        best.setdefault(asked[i].kind, asked[i])
    return list(best.values())


def _how_many(scene: Scene, counts: Counter[str], rng: np.random.Generator) -> Question:
    if rng.random() < 0.4:
        return Question("how many things are there?", str(len(scene.things)), "how many")
    name = list(counts)[int(rng.integers(len(counts)))]
    return Question(f"how many {plural(name)} are there?", str(counts[name]), "how many")


def _is_there(scene: Scene, counts: Counter[str], rng: np.random.Generator, count: int) -> Question:
    if rng.random() < 0.5:
        return Question(f"is there {article(list(counts)[int(rng.integers(len(counts)))])}?", "yes", "is there")
    return Question(f"is there {article(another(rng, counts, scene.unseen, count))}?", "no", "is there")


def _relations(scene: Scene, single: list[Thing], rng: np.random.Generator) -> list[Question]:
    """`is the dog left of the cat?` (yes and no equally often), and `what is left of the cat?` where one thing is."""
    asked = []
    size = len(scene.image)
    for a in single:
        for b in single:
            where = relation(a, b, size) if a is not b else None
            if where is None:
                continue
            said, answer = (where, "yes") if rng.random() < 0.5 else (DIRECTIONS[where], "no")
            asked.append(Question(f"is the {a.concept.name} {said} the {b.concept.name}?", answer, "relation"))
            there = [t for t in scene.things if t is not b and relation(t, b, size) in (where, None)]
            if there == [a]:
                asked.append(Question(f"what is {where} the {b.concept.name}?", a.concept.name, "which"))
    return asked


def phrases(scene: Scene, rng: np.random.Generator) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Referring phrases and the box that each means: by name, by side among equals, or by relation to another thing."""
    size = len(scene.image)
    counts = Counter(t.concept.name for t in scene.things)
    single = [t for t in scene.things if counts[t.concept.name] == 1]
    found = []
    for thing in scene.things:
        name = thing.concept.name
        if counts[name] == 1:
            found.append((f"the {name}", thing.box))
            for other in single:
                where = relation(thing, other, size) if other is not thing else None
                also = [t for t in scene.things if t is not other and relation(t, other, size) in (where, None)]
                if where and also == [thing]:
                    found.append((f"the thing {where} the {other.concept.name}", thing.box))
            continue
        same = [t for t in scene.things if t.concept.name == name and t is not thing]
        for side in ("left", "right", "top", "bottom"):
            axis, sign = (0, 1) if side in ("left", "right") else (1, 1)
            sign = 1 if side in ("left", "top") else -1
            if all(sign * (t.centre[axis] - thing.centre[axis]) > _CLEAR * size for t in same):
                found.append((f"the {side} {name}", thing.box))
    return [found[i] for i in rng.permutation(len(found))]
