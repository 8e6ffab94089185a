"""Compositional questions with the programs that answer them (as in GQA: Hudson and Manning, CVPR 2019).

    is there a cat left of the dog?      select(dog) -> relate(cat, left of) -> exist
    what is above the thing left of the cup?   select(cup) -> relate(left of) -> relate(above) -> query(name)

Of each kind of question yes and no, or the two choices, are equally often right. A question about what a relation finds
entails the question whether it is there, whose answer is yes: such a question is given too and is not `balanced`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.data.pictograms.kinds import KINDS, Kind, Rows, cell, image, strings, value
from trimtab.data.pictograms.language import DIRECTIONS, article, plural, relation
from trimtab.data.pictograms.scenes import Scene, Thing, World

ANSWERS = tuple(DIRECTIONS)  # beside those of plain questions


@dataclass(frozen=True)
class Step:
    """One operation on what earlier steps found; `on` are their numbers."""

    operation: str
    argument: str = ""
    on: tuple[int, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        text: its words.
        program: the steps that answer it.
        answer: what they give.
        full: the answer as a sentence.
        structural: `verify`, `query`, `choose`, `logical` or `compare`.
        semantic: `obj` for what there is, `rel` for where it is.
        detailed: a name for questions that are built alike.
        group: of questions with answers of one kind; "" if there is none.
        entails: the question whose answer follows from this one's.
    """

    text: str
    program: tuple[Step, ...]
    answer: str
    full: str
    structural: str
    semantic: str
    detailed: str
    group: str = ""
    entails: Asked | None = field(default=None, compare=False)


def run(program: tuple[Step, ...], scene: Scene) -> str:
    """The answer that a program gives on a scene.

    Raises:
        ValueError: if a step asks for one thing where there are none or several, or is unknown.
    """
    found: list[Any] = []
    for step in program:
        found.append(_OPERATIONS[step.operation](scene, step.argument, [found[i] for i in step.on]))
    return str(found[-1])


def _select(scene: Scene, name: str, _: list[Any]) -> list[Thing]:
    return [t for t in scene.things if t.concept.name == name]


def _relate(scene: Scene, argument: str, given: list[Any]) -> list[Thing]:
    """Things that stand so to the one thing given; `NAME,DIRECTION`, or `,DIRECTION` for things of any name."""
    name, where = argument.split(",")
    (anchor,) = given[0]
    return [
        t for t in scene.things
        if t is not anchor and name in ("", t.concept.name) and relation(t, anchor, len(scene.image)) == where
    ]  # fmt: skip


def _query(scene: Scene, _: str, given: list[Any]) -> str:
    (one,) = {t.concept.name for t in given[0]}
    return one


def _choose(scene: Scene, argument: str, given: list[Any]) -> str:
    ((a,), (b,)) = given
    where = relation(a, b, len(scene.image))
    if where not in argument.split("|"):
        raise ValueError(f"neither of {argument}: {where}")
    return str(where)


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


_OPERATIONS: dict[str, Callable[[Scene, str, list[Any]], Any]] = {
    "select": _select,
    "relate": _relate,
    "exist": lambda scene, _, given: _yes(bool(given[0])),
    "query": _query,
    "choose rel": _choose,
    "and": lambda scene, _, given: _yes(all(g == "yes" for g in given)),
    "or": lambda scene, _, given: _yes(any(g == "yes" for g in given)),
    "more": lambda scene, _, given: _yes(len(given[0]) > len(given[1])),
}


# --- asking -----------------------------------------------------------------------------------------------------------


def _exist_relation(name: str, where: str, anchor: str, answer: str) -> Asked:
    steps = (Step("select", anchor), Step("relate", f"{name},{where}", (0,)), Step("exist", "", (1,)))
    full = f"{answer}, there is {'no' if answer == 'no' else article(name).split()[0]} {name} {where} the {anchor}"
    return Asked(f"is there {article(name)} {where} the {anchor}?", steps, answer, full, "verify", "rel", "existRel")


def _what(found: Thing, path: list[tuple[str, str]]) -> Asked:
    """What a chain of relations finds; `path` is (name of the anchor, direction), then directions."""
    name, anchor = found.concept.name, path[0][0]
    steps = [Step("select", anchor)]
    where = f"the {anchor}"
    for i, (_, direction) in enumerate(path):
        steps.append(Step("relate", f",{direction}", (i,)))
        where = f"{direction} {where}" if i + 1 == len(path) else f"the thing {direction} {where}"
    steps.append(Step("query", "name", (len(path),)))
    entailed = _exist_relation(name, path[0][1], anchor, "yes") if len(path) == 1 else None
    detailed = "relO" if len(path) == 1 else "relChainO"
    return Asked(f"what is {where}?", tuple(steps), name, f"it is {article(name)}", "query", "rel", detailed,
                 path[-1][1], entailed)  # fmt: skip


def _relational(scene: Scene, rng: np.random.Generator, world: World) -> list[Asked]:
    size, asked = len(scene.image), []
    names = [t.concept.name for t in scene.things]
    single = [t for t in scene.things if names.count(t.concept.name) == 1]

    def only(anchor: Thing, where: str) -> Thing | None:
        """The one thing that stands so to another, where no other may seem to."""
        there = [t for t in scene.things if t is not anchor and relation(t, anchor, size) in (where, None)]
        return there[0] if len(there) == 1 and relation(there[0], anchor, size) == where else None

    for b in single:
        for side in DIRECTIONS:
            first = only(b, side)
            if first is None:
                continue
            asked.append(_what(first, [(b.concept.name, side)]))
            for then in DIRECTIONS:
                second = only(first, then)
                if second is not None and second is not b:
                    asked.append(_what(second, [(b.concept.name, side), ("", then)]))
    for a in single:
        for b in single:
            where = relation(a, b, size) if a is not b else None
            if where is None:
                continue
            pair = [where, DIRECTIONS[where]] if rng.random() < 0.5 else [DIRECTIONS[where], where]
            steps = (Step("select", a.concept.name), Step("select", b.concept.name),
                     Step("choose rel", "|".join(pair), (0, 1)))  # fmt: skip
            text = f"is the {a.concept.name} {pair[0]} or {pair[1]} the {b.concept.name}?"
            full = f"the {a.concept.name} is {where} the {b.concept.name}"
            asked.append(Asked(text, steps, where, full, "choose", "rel", "chooseRel", "",
                               _exist_relation(a.concept.name, where, b.concept.name, "yes")))  # fmt: skip
            asked.append(_verify(a, b, where, rng, world, names))
    return asked


def _verify(a: Thing, b: Thing, where: str, rng: np.random.Generator, world: World, names: list[str]) -> Asked:
    """Whether something stands so to another; where it does not, the thing or the direction is another."""
    if rng.random() < 0.5:
        return _exist_relation(a.concept.name, where, b.concept.name, "yes")
    if rng.random() < 0.5:
        return _exist_relation(a.concept.name, DIRECTIONS[where], b.concept.name, "no")
    return _exist_relation(world.other(rng, names), where, b.concept.name, "no")


def _of_what_there_is(scene: Scene, rng: np.random.Generator, world: World) -> list[Asked]:
    names = [t.concept.name for t in scene.things]
    kinds = list(dict.fromkeys(names))
    here, absent = kinds[int(rng.integers(len(kinds)))], world.other(rng, names)
    asked = []
    x = here if rng.random() < 0.5 else absent
    answer = _yes(x in names)
    steps: tuple[Step, ...] = (Step("select", x), Step("exist", "", (0,)))
    full = f"{answer}, there is {article(x) if answer == 'yes' else f'no {x}'}"
    asked.append(Asked(f"is there {article(x)}?", steps, answer, full, "verify", "obj", "exist"))
    word, truth = ("and", len(kinds) > 1 and rng.random() < 0.5) if rng.random() < 0.5 else ("or", rng.random() < 0.5)
    two = [k for k in kinds if k != here]
    if word == "and":
        pair = [here, two[int(rng.integers(len(two)))] if truth else absent]
    else:
        pair = [here if truth else world.other(rng, [*names, absent]), absent]
    if word == "or" or two:
        pair = [pair[i] for i in rng.permutation(2)]
        steps = (Step("select", pair[0]), Step("exist", "", (0,)), Step("select", pair[1]), Step("exist", "", (2,)),
                 Step(word, "", (1, 3)))  # fmt: skip
        answer = _yes(truth)
        asked.append(Asked(f"is there {article(pair[0])} {word} {article(pair[1])}?", steps, answer, answer,
                           "logical", "obj", f"exist{word.capitalize()}"))  # fmt: skip
    counts = {k: names.count(k) for k in kinds}
    unequal = [(a, b) for a in kinds for b in kinds if counts[a] > counts[b]]
    if unequal:
        a, b = unequal[int(rng.integers(len(unequal)))]
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        answer = _yes(counts[a] > counts[b])
        steps = (Step("select", a), Step("select", b), Step("more", "", (0, 1)))
        asked.append(Asked(f"are there more {plural(a)} than {plural(b)}?", steps, answer, answer, "compare", "obj",
                           "more"))  # fmt: skip
    return asked


def rows(world: World, index: int) -> Rows:
    """One question of each form that the scene allows, and the questions that they entail."""
    scene, rng = world.scene(index), world.rng(index, 6)
    asked = [*_of_what_there_is(scene, rng, world), *_relational(scene, rng, world)]
    chosen: dict[str, Asked] = {}
    for i in rng.permutation(len(asked)):
        chosen.setdefault(asked[i].detailed, asked[i])
    balanced = list(chosen.values())
    entailed = [q.entails for q in balanced if q.entails is not None]
    every = [*balanced, *(q for q in dict.fromkeys(entailed) if q not in balanced)]
    ids = {q: f"{world.split}-{index}-{i}" for i, q in enumerate(every)}
    picture = cell(scene.png())
    return [{"image": picture, **_row(q, ids, i < len(balanced))} for i, q in enumerate(every)]


def _row(q: Asked, ids: dict[Asked, str], balanced: bool) -> dict[str, Any]:
    return {
        "question": q.text, "answer": q.answer, "full_answer": q.full, "question_id": ids[q],
        "structural": q.structural, "semantic": q.semantic, "detailed": q.detailed, "group": q.group,
        "entailed": [ids[q.entails]] if q.entails is not None else [], "balanced": balanced, "steps": len(q.program),
        "kind": q.detailed,
        "program": json.dumps([{"operation": s.operation, "argument": s.argument, "dependencies": list(s.on)}
                               for s in q.program]),
    }  # fmt: skip


def _features() -> dict[str, Any]:
    words = ("question", "answer", "full_answer", "question_id", "structural", "semantic", "detailed", "group")
    return {
        "image": image(), **{n: value("string") for n in words}, "entailed": strings(), "balanced": value("bool"),
        "steps": value("int32"), "kind": value("string"), "program": value("string"),
    }  # fmt: skip


KINDS.register("programs")(Kind(rows, _features, whole=True))
