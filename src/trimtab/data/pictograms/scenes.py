"""Composing scenes: 1-4 cut-outs of real art on a varied background, each with its exact box.

A scene is a pure function of (style, split, seed, index, size): each has its own random generator, so that scenes can
be made in any order and in several processes and are always the same.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from trimtab.data.pictograms.concepts import Concept, art, concepts

SPLITS = ("train", "validation", "test", "unseen-concepts", "unseen-combinations")
COUNT_WEIGHTS = (0.15, 0.35, 0.3, 0.2)  # how many scenes hold 1, 2, 3, 4 things
SIDES = {1: (0.42, 0.68), 2: (0.34, 0.5), 3: (0.3, 0.44), 4: (0.28, 0.4)}  # longer side of a thing / side of the scene
UNSEEN_SHARE = 0.1  # of the concepts, and of the pairs of concepts, are kept out of the training scenes


@dataclass(frozen=True)
class Thing:
    """One cut-out in a scene; `box` is (left, top, right, bottom) in pixels, right and bottom exclusive."""

    concept: Concept
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """An image of shape (size, size, 3), uint8, and the things in it, in the order in which they were drawn."""

    image: np.ndarray
    things: tuple[Thing, ...]

    @property
    def unseen(self) -> bool:
        """Whether no training scene holds what stands here: all scenes of `unseen-concepts`, and no others."""
        return all(_share(t.concept.code) < UNSEEN_SHARE for t in self.things)

    def png(self) -> bytes:
        return png(self.image)


def png(image: np.ndarray) -> bytes:
    """A picture (H, W, 3), uint8, as a PNG file."""
    buffer = io.BytesIO()
    # Level 1 is 3x faster than the default for files 5 % larger: encoding is most of a scene's cost.
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@cache
def concept_groups(count: int = 240) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices into `concepts(count)`: those that training scenes may hold, and the unseen ones."""
    unseen = {i for i, c in enumerate(concepts(count)) if _share(c.code) < UNSEEN_SHARE}
    return tuple(i for i in range(count) if i not in unseen), tuple(sorted(unseen))


def is_unseen_pair(a: Concept, b: Concept) -> bool:
    """Whether two seen concepts never stand together in a training scene."""
    return a != b and _share("+".join(sorted((a.code, b.code)))) < UNSEEN_SHARE


def another(rng: np.random.Generator, present: Collection[str], unseen: bool, count: int) -> str:
    """The name of a concept that is none of these: of the unseen ones, or of those that training scenes hold.

    Raises:
        ValueError: if there is none.
    """
    pool = concept_groups(count)[unseen]
    if all(concepts(count)[i].name in present for i in pool):
        kind = "unseen" if unseen else "seen"
        raise ValueError(f"of {count} concepts {len(pool)} are {kind}, and all of them are here: raise `count`")
    while (name := concepts(count)[int(rng.choice(pool))].name) in present:
        pass
    return name


@cache
def _share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(f"split {text}".encode()).digest()[:6], "big") / 2**48


def compose(style: str, split: str, seed: int, index: int, size: int = 64, count: int = 240) -> Scene:
    """Make scene number `index` of a split.

    Args:
        style: `twemoji`, `openmoji`, `twemoji-varied` or `illustrators-varied` (`concepts.ARTISTS`).
        split: `train`, `validation` and `test` share their concepts and pairs but no scene; `unseen-concepts` holds
            only concepts, and `unseen-combinations` at least one pair of concepts, that no training scene has.
        seed: another seed gives other scenes.
        index: number of the scene in its split.
        size: side of the image in pixels.
        count: number of concepts in the world.

    Raises:
        ValueError: if the style or the split is unknown.
    """
    if split not in SPLITS:
        from trimtab.registry import unknown

        raise ValueError(unknown("split", split, SPLITS))
    if (few := len(concept_groups(count)[split == "unseen-concepts"])) < 4:  # a scene holds up to four kinds of thing
        kind = "unseen" if split == "unseen-concepts" else "seen"
        raise ValueError(f"of {count} concepts {few} are {kind}, the split {split!r} needs 4: raise `count`")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    while True:
        scene = _draw_scene(rng, art(style, count), _choose(rng, split, count), size, count)
        # A thing that finds no free place is left out; the pair for which the scene was made must not go with it.
        if split != "unseen-combinations" or _has_unseen_pair([t.concept for t in scene.things]):
            return scene


@dataclass(frozen=True)
class World:
    """What all scenes of a table have in common; see `compose` for the fields."""

    style: str
    split: str
    seed: int
    size: int
    count: int

    def scene(self, index: int) -> Scene:
        return compose(self.style, self.split, self.seed, index, self.size, self.count)

    def rng(self, index: int, salt: int) -> np.random.Generator:
        """A generator of its own for number `index` of the split."""
        return np.random.default_rng([self.seed, SPLITS.index(self.split), index, salt])

    def choose(self, rng: np.random.Generator) -> list[int]:
        """Which concepts one scene holds, by their numbers, as the split demands."""
        return _choose(rng, self.split, self.count)

    def allows(self, chosen: Sequence[int]) -> bool:
        """Whether these concepts may stand together in a scene of the split that is not made for an unseen pair."""
        names = concepts(self.count)
        return self.split == "unseen-concepts" or not _has_unseen_pair([names[i] for i in chosen])

    def draw(self, rng: np.random.Generator, chosen: list[int]) -> Scene:
        """A scene of these concepts; what finds no free place is left out."""
        return _draw_scene(rng, art(self.style, self.count), chosen, self.size, self.count)

    def other(self, rng: np.random.Generator, present: Collection[str]) -> str:
        """The name of a concept of the split that is none of these."""
        return another(rng, present, self.split == "unseen-concepts", self.count)


def _draw_scene(
    rng: np.random.Generator, drawings: tuple[tuple[np.ndarray, ...], ...], chosen: list[int], size: int, count: int
) -> Scene:
    canvas = backdrop(rng, size)
    things: list[Thing] = []
    for i in chosen:
        variants = drawings[i]
        drawing = variants[int(rng.integers(len(variants)))] if len(variants) > 1 else variants[0]
        placed = _place(rng, drawing, size, len(chosen), [t.box for t in things])
        if placed is not None:
            scaled, box = placed
            canvas.alpha_composite(scaled, box[:2])
            things.append(Thing(concepts(count)[i], box))
    return Scene(np.asarray(canvas.convert("RGB")), tuple(things))


def _has_unseen_pair(members: list[Concept]) -> bool:
    return any(is_unseen_pair(a, b) for k, a in enumerate(members) for b in members[:k])


def _choose(rng: np.random.Generator, split: str, count: int) -> list[int]:
    """Which concepts: some of them twice (so that counting is a question), pairs as the split demands."""
    seen, unseen = concept_groups(count)
    names = concepts(count)
    pool = unseen if split == "unseen-concepts" else seen
    while True:
        number = 1 + int(rng.choice(4, p=COUNT_WEIGHTS))
        if split == "unseen-combinations":
            number = max(number, 2)
        chosen = [int(i) for i in rng.choice(pool, size=number, replace=False)]
        if number > 1 and rng.random() < 0.35:
            chosen[1:] = [chosen[0] if rng.random() < 0.6 else i for i in chosen[1:]]
        if split == "unseen-concepts":
            return chosen
        if _has_unseen_pair([names[i] for i in chosen]) == (split == "unseen-combinations"):
            return chosen


def _place(
    rng: np.random.Generator, drawing: np.ndarray, size: int, number: int, taken: list[tuple[int, int, int, int]]
) -> tuple[Image.Image, tuple[int, int, int, int]] | None:
    """Scale a drawing and find a free place for it; None if 60 tries find none (the scene then holds one fewer)."""
    low, high = SIDES[number]
    height, width = drawing.shape[:2]
    for attempt in range(60):
        # Later tries take the smallest size: four things must fit.
        side = size * (low if attempt > 20 else rng.uniform(low, high))
        scale = side / max(height, width)
        w, h = max(2, round(width * scale)), max(2, round(height * scale))
        x, y = int(rng.integers(0, size - w + 1)), int(rng.integers(0, size - h + 1))
        if all(x + w <= l or x >= r or y + h <= t or y >= b for l, t, r, b in taken):  # noqa: E741
            small = Image.fromarray(drawing).resize((w, h), Image.Resampling.BILINEAR)
            return small, (x, y, x + w, y + h)
    return None


def backdrop(rng: np.random.Generator, size: int) -> Image.Image:
    """A plain, shaded, split, striped or speckled ground in pale to middle tones, so that every style stands out."""
    a, b = rng.integers(110, 256, size=(2, 3)).astype(np.float32)
    kind = rng.integers(5)
    y, x = _grid(size)
    if kind == 0:
        mix = np.zeros((size, size), np.float32)
    elif kind == 1:
        angle = rng.uniform(0, 2 * np.pi)
        mix = (np.cos(angle) * x + np.sin(angle) * y) / 2 + 0.5
    elif kind == 2:
        mix = ((y if rng.random() < 0.5 else x) > rng.uniform(-0.5, 0.5)).astype(np.float32)
    elif kind == 3:
        angle = rng.uniform(0, np.pi)
        mix = 0.5 + 0.5 * np.sign(np.sin(rng.uniform(6, 16) * (np.cos(angle) * x + np.sin(angle) * y)))
    else:
        mix = rng.random((size, size), dtype=np.float32)
    strength = rng.uniform(0.2, 0.7)
    pixels = a + (strength * np.clip(mix, 0, 1))[..., None] * (b - a)
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGBA")


@cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return y, x
