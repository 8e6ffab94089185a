"""Kinds of rows: what one number of a split gives, and the columns. The first three are said of a single picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.data.pictograms import language
from trimtab.data.pictograms.scenes import Scene, World
from trimtab.registry import Registry

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """One schema of rows.

    Attributes:
        rows: from the world and a number to the rows that this number gives, pictures included.
        features: the columns, as a `datasets.Features` would describe them.
        whole: whether all rows of a number belong together; else some are kept, `per_scene`.
    """

    rows: Callable[[World, int], Rows]
    features: Callable[[], dict[str, Any]]
    whole: bool = False


KINDS: Registry[Kind] = Registry("kind of pictogram data")


def value(dtype: str) -> Any:
    from datasets import Value

    return Value(dtype)


def strings() -> Any:
    from datasets import List, Value

    return List(Value("string"))


def image() -> Any:
    from datasets import Image

    return Image()


def cell(png: bytes) -> dict[str, Any]:
    """A picture as a table holds it."""
    return {"bytes": png, "path": None}


def of_scene(say: Callable[[Scene, np.random.Generator, int], Rows]) -> Callable[[World, int], Rows]:
    """Rows of one scene from what is said of it."""

    def rows(world: World, index: int) -> Rows:
        scene = world.scene(index)
        said = say(scene, world.rng(index, 1), world.count)
        picture = cell(scene.png()) if said else {}
        return [{"image": picture, **row} for row in said]

    rows.__module__ = say.__module__
    return rows


def _retrieval(scene: Scene, rng: np.random.Generator, count: int) -> Rows:
    """Four wordings of the caption, and four captions that are each wrong in one point."""
    return [
        {
            "captions": [language.caption(scene, rng) for _ in range(4)],
            "foils": [language.foil(scene, rng, count) for _ in range(4)],
        }
    ]


def _vqa(scene: Scene, rng: np.random.Generator, count: int) -> Rows:
    return [{"question": q.text, "answer": q.answer, "kind": q.kind} for q in language.questions(scene, rng, count)]


def _grounding(scene: Scene, rng: np.random.Generator, count: int) -> Rows:
    return [{"phrase": phrase, "box": list(box)} for phrase, box in language.phrases(scene, rng)]


def _box() -> Any:
    from datasets import List, Value

    return List(Value("int32"), length=4)


def _groups(world: World, index: int) -> Rows:
    """One thing; its name and the Unicode category that it is in.

    Raises:
        ValueError: of `unseen-combinations`: one thing is no pair.
    """
    if world.split == "unseen-combinations":
        raise ValueError("'groups' rows show one thing, the split 'unseen-combinations' has pairs of things: take "
                         "'unseen-concepts' or 'test'")  # fmt: skip
    rng = world.rng(index, 2)
    scene = world.draw(rng, world.choose(rng)[:1])
    concept = scene.things[0].concept
    return [{"image": cell(scene.png()), "label": concept.category, "name": concept.name}]


KINDS.register("retrieval")(
    Kind(of_scene(_retrieval), lambda: {"image": image(), "captions": strings(), "foils": strings()})
)
KINDS.register("vqa")(
    Kind(of_scene(_vqa), lambda: {"image": image(), **{n: value("string") for n in ("question", "answer", "kind")}})
)
KINDS.register("grounding")(
    Kind(of_scene(_grounding), lambda: {"image": image(), "phrase": value("string"), "box": _box()})
)
KINDS.register("groups")(Kind(_groups, lambda: {"image": image(), "label": value("string"), "name": value("string")}))
