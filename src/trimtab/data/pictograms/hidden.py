"""Does a picture entail a statement, contradict it, or leave it open (as in SNLI-VE: Xie et al., 2019)?

A curtain hides one half of every picture. What is said of that half stays open: `neutral`. A number gives one
statement of each label about the same picture, and statements of all labels name things equally often, so that neither
side alone says anything of the label.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trimtab.data.pictograms.kinds import KINDS, Kind, Rows, cell, image, value
from trimtab.data.pictograms.language import article
from trimtab.data.pictograms.scenes import Scene, Thing, World, png

SIDES = ("left", "right", "top", "bottom")
_SAID = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
_OTHER = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


def _within(thing: Thing, side: str, size: int) -> bool:
    """Whether a thing stands wholly in a half of the picture."""
    left, top, right, bottom = thing.box
    half = size / 2
    return {"left": right <= half, "right": left >= half, "top": bottom <= half, "bottom": top >= half}[side]


def _curtained(scene: Scene, side: str, rng: np.random.Generator) -> np.ndarray:
    picture = scene.image.copy()
    half = len(picture) // 2
    where: dict[str, Any] = {
        "left": np.s_[:, :half], "right": np.s_[:, half:], "top": np.s_[:half], "bottom": np.s_[half:]
    }  # fmt: skip
    picture[where[side]] = rng.integers(40, 90, 3)
    return picture


def rows(world: World, index: int) -> Rows:
    rng = world.rng(index, 4)
    scene, size = world.draw(rng, world.choose(rng)), world.size
    fitting = [(s, t) for s in SIDES for t in scene.things if _within(t, s, size)]
    # Nothing may be cut in two by the curtain: a half of it would still be seen.
    fitting = [
        (s, t) for s, t in fitting if all(_within(o, s, size) or _within(o, _OTHER[s], size) for o in scene.things)
    ]
    if not fitting:
        return []
    side, thing = fitting[int(rng.integers(len(fitting)))]
    hidden = _OTHER[side]
    present = {t.concept.name for t in scene.things}
    absent = world.other(rng, present)
    open_ = world.other(rng, {*present, absent})  # that it does not stand there at all is not known
    picture = cell(png(_curtained(scene, hidden, rng)))
    said = [
        (f"{article(thing.concept.name)} is {_SAID[side]}", "entailment"),
        (f"{article(absent)} is {_SAID[side]}", "contradiction"),
        (f"{article(open_)} is {_SAID[hidden]}", "neutral"),
    ]
    found = [
        {"image": picture, "statement": text, "label": label, "pair_id": f"{world.split}-{index}-{label[0]}"}
        for text, label in said
    ]
    return [found[i] for i in rng.permutation(len(found))]


KINDS.register("entailment")(
    Kind(rows, lambda: {"image": image(), **{n: value("string") for n in ("statement", "label", "pair_id")}}, True)
)
