"""Scenes: pictures, boxes, and what each split holds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.data.scenes_read import DRAWN, NAMES, SEEN, SIZE, some_scenes, things
from trimtab.data.pictograms import language, scenes
from trimtab.data.pictograms.concepts import COLOURS, art, concepts
from trimtab.data.pictograms.variation import VARIANTS, vary

CROWDED = (246, 425, 558, 619)  # what carried the unseen pair found no free place there


# --- pictures and boxes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", DRAWN)
def test_boxes_lie_inside_and_apart(style):
    for scene in some_scenes("train", style):
        assert scene.image.shape == (SIZE, SIZE, 3) and scene.image.dtype == np.uint8
        assert 1 <= len(scene.things) <= 4
        covered = np.zeros((SIZE, SIZE), int)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1


@pytest.mark.parametrize("style", DRAWN)
@pytest.mark.parametrize("size", [48, 96])
def test_boxes_are_exact(style, size, monkeypatch):
    """On a plain ground, a thing fills its box to every edge and nothing is drawn outside."""
    ground = (255, 0, 255)
    monkeypatch.setattr(scenes, "backdrop", lambda rng, size: Image.new("RGBA", (size, size), (*ground, 255)))
    for index in range(60):
        scene = scenes.compose(style, "test", 1, index, size)
        drawn = (scene.image != ground).any(axis=-1)
        outside = drawn.copy()
        for thing in scene.things:
            left, top, right, bottom = thing.box
            outside[top:bottom, left:right] = False
            inside = drawn[top:bottom, left:right]
            for edge in (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:]):
                assert edge.any(), f"{thing.concept.name} in scene {index} does not touch an edge of its box"
        assert not outside.any()


@pytest.mark.parametrize("style", DRAWN)
def test_art_is_one_trimmed_visible_drawing_a_concept(style):
    drawings = art(style)
    assert len(drawings) == len(concepts()) == 240
    variants, largest = (VARIANTS, 1.5 * 72) if style == "twemoji-varied" else (1, 72)
    for concept, redrawn in zip(concepts(), drawings, strict=True):
        assert len(redrawn) == variants
        for drawing in redrawn:
            assert drawing.dtype == np.uint8 and drawing.shape[2] == 4 and max(drawing.shape) <= largest
            seen = drawing[..., 3] > 32
            assert seen[0].any() and seen[-1].any() and seen[:, 0].any() and seen[:, -1].any(), concept.name
    assert len({d.tobytes() for redrawn in drawings for d in redrawn}) == 240 * variants


def test_redrawn_things_keep_the_first_drawing_and_the_colours_that_names_state():
    plain, redrawn = art("twemoji"), art("twemoji-varied")
    for (first,), (same, *_) in zip(plain, redrawn, strict=True):
        assert np.array_equal(first, same)
    apple = [c.name for c in concepts()].index("red apple")
    for drawing in redrawn[apple]:
        red, green, blue = drawing[drawing[..., 3] > 200][:, :3].mean(0)
        assert red > green and red > blue
    assert (
        vary(plain[apple][0], np.random.default_rng(3)).tobytes()
        == vary(plain[apple][0], np.random.default_rng(3)).tobytes()
    )


def test_concepts_cannot_be_mistaken_for_each_other():
    """No name is part of another (else "is there a dog?" has two answers), and no two sound alike in the plural."""
    names = [c.name for c in concepts()]
    assert len(set(names)) == len({language.plural(n) for n in names}) == 240
    colourless = [c for c in concepts() if not c.colour]
    for c in colourless:
        assert not any(c.name in other.name.split() or c.name == other.noun for other in concepts() if other is not c)
    assert {c.colour for c in concepts()} <= {None, *COLOURS}
    assert concepts(50) == concepts()[:50]


def test_a_world_too_small_for_a_split():
    with pytest.raises(ValueError, match="of 12 concepts 1 are unseen, the split 'unseen-concepts' needs 4"):
        scenes.compose("twemoji", "unseen-concepts", 0, 0, count=12)


def test_more_concepts_than_there_are():
    with pytest.raises(ValueError, match="100000 were asked for"):
        concepts(100_000)


# --- splits -----------------------------------------------------------------------------------------------------------


def pairs_unseen(scene: scenes.Scene) -> int:
    found = [t.concept for t in scene.things]
    return sum(scenes.is_unseen_pair(a, b) for a in found for b in found) // 2


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_ordinary_splits_hold_seen_concepts_in_seen_pairs(split):
    held = some_scenes(split)
    assert {name for s in held for name in things(s)} <= SEEN
    assert not any(pairs_unseen(s) for s in held)


def test_unseen_concepts_are_unseen_in_training():
    found = {name for s in some_scenes("unseen-concepts") for name in things(s)}
    assert not found & SEEN
    assert found == NAMES - SEEN and 10 < len(found) < 50


def test_unseen_combinations_pair_seen_concepts_anew():
    held = some_scenes("unseen-combinations")
    assert {name for s in held for name in things(s)} <= SEEN
    assert sum(pairs_unseen(s) > 0 for s in held) >= 0.99 * len(held)


def test_every_scene_of_unseen_combinations_holds_an_unseen_pair():
    crowded = [scenes.compose("twemoji", "unseen-combinations", 0, index, SIZE) for index in CROWDED]
    assert all(pairs_unseen(s) for s in crowded)


def test_splits_share_no_scene():
    pictures = [s.png() for split in scenes.SPLITS for s in some_scenes(split)]
    assert len(set(pictures)) == len(pictures)


def test_scenes_hold_one_to_four_things_and_sometimes_equal_ones():
    sizes = Counter(len(s.things) for s in some_scenes())
    assert all(sizes[n] > 0.08 * 400 for n in (1, 2, 3, 4))
    assert 0.1 < np.mean([max(things(s).values()) > 1 for s in some_scenes()]) < 0.5
