"""Readers of pictures with captions: rows, splits, forms, and what they say of broken files."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Image

from tests.data.made_sets import flickr30k, karpathy_image, picture, write
from trimtab.data import wording
from trimtab.data.formats.coco import COCO, COCOCaptions
from trimtab.data.formats.karpathy import Flickr30K
from trimtab.data.formats.karpathy_flickr8k import Flickr8K
from trimtab.data.reading import DataError


def names(table) -> list[str]:
    """Names of the pictures of a table."""
    return [row["image"]["path"].rpartition("/")[2] for row in table.cast_column("image", Image(decode=False))]


def test_karpathy_gives_pictures_with_all_captions_as_written(tmp_path):
    source = Flickr30K(root=flickr30k(tmp_path))
    train, validation, test = (source.load("retrieval", s) for s in ("train", "validation", "test"))
    assert names(train) == ["1.jpg", "22.jpg"] and names(validation) == ["333.jpg"] and names(test) == ["4444.jpg"]
    assert test[0]["captions"] == ["A dog, 4444.jpg.", " Two cats ."]
    assert test[0]["image_id"] == "4444" and test[0]["caption_ids"] == ["80", "81"]
    assert test[0]["image"].size == (8, 6)
    both = Flickr30K(root=tmp_path, train=("train", "val")).load("captioning", "train")
    assert names(both) == ["1.jpg", "22.jpg", "333.jpg"]
    assert len(Flickr30K(root=tmp_path, rows=1).load("retrieval", "train")) == 1


def test_a_row_a_caption_in_training_alone(tmp_path):
    source = Flickr30K(root=flickr30k(tmp_path), train_rows="caption", wording="xvlm", max_words=2)
    train = source.load("retrieval", "train")
    assert train["captions"][:] == [["a dog"], ["two cats"]] * 2
    assert train["caption_ids"][:] == [["50"], ["51"], ["60"], ["61"]]
    assert source.load("retrieval", "test")["captions"][:] == [["a dog", "two cats"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images[1].pop("split"), r"flickr30k\.json, images\[1\]: expected the field 'split'"),
        (lambda images: images[1].update(split="tset"), r"images\[1\]: 'split': unknown value 'tset': did you"),
        (lambda images: images[0].update(sentences=[]), r"images\[0\]: the picture '1.jpg' has no caption"),
        (lambda images: images[0]["sentences"][1].pop("raw"), r"images\[0\], sentences\[1\]: expected the field 'raw'"),
        (lambda images: images[0]["sentences"][0].update(raw=7), r"sentences\[0\]: expected 'raw' to be a string"),
        (lambda images: images[0]["sentences"][0].update(raw=" "), r"sentences\[0\]: expected 'raw' to hold words"),
        (lambda images: images[1].update(filename="gone.jpg"), r"images\[1\]: the picture 'gone.jpg' is not there"),
        (lambda images: images[3].update(filename="1.jpg"), r"images\[3\]: the picture '1.jpg' stands twice"),
        (lambda images: images[3].update(imgid=0), r"images\[3\]: the imgid '0' stands twice"),
        (lambda images: images.insert(1, "no object"), r"images\[1\]: expected an object with named fields"),
    ],
)  # fmt: skip
def test_a_broken_row_stops_the_reading_or_is_left_out(tmp_path, caplog, change, message):
    path = flickr30k(tmp_path) / "karpathy/dataset_flickr30k.json"
    content = json.loads(path.read_text())
    change(content["images"])
    write(path, content)
    with pytest.raises(DataError, match=message):
        Flickr30K(root=tmp_path).table("retrieval", "train", "val", "test")
    with caplog.at_level(logging.WARNING):
        table = Flickr30K(root=tmp_path, on_error="skip").table("retrieval", "train", "val", "test")
    assert len(table) == len(content["images"]) - 1
    told = caplog.messages[-1]
    assert told.startswith(f"data 'flickr30k' train+val+test: left out 1, kept {len(table)} rows:\n  {path}")


def test_pictures_that_cannot_be_decoded_are_left_out_when_asked(tmp_path, caplog):
    root = flickr30k(tmp_path)
    whole = (root / "flickr30k-images/1.jpg").read_bytes()
    (root / "flickr30k-images/1.jpg").write_bytes(whole[: len(whole) // 2])
    assert len(Flickr30K(root=root).load("retrieval", "train")) == 2  # found when it is used, named by `decode`
    with caplog.at_level(logging.WARNING):
        assert names(Flickr30K(root=root, on_error="skip").load("retrieval", "train")) == ["22.jpg"]
    assert "dataset_flickr30k.json, images[0]" in caplog.text and "1.jpg: cannot be decoded" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [{"filename": "1.j', r"flickr30k\.json, line 1, column \d+: the file seems to be cut off"),
        ('{"pictures": []}', r"flickr30k\.json: expected a JSON object with the list 'images'"),
        ('{"images": {}}', r"flickr30k\.json: expected 'images' to be a JSON list"),
        ('{"images": []}', r"data 'flickr30k' train: holds no rows"),
    ],
)  # fmt: skip
def test_a_file_that_is_broken_as_a_whole_always_stops(tmp_path, text, message):
    write(flickr30k(tmp_path) / "karpathy/dataset_flickr30k.json", text)
    for on_error in ("stop", "skip"):
        with pytest.raises(DataError, match=message):
            Flickr30K(root=tmp_path, on_error=on_error).load("retrieval", "train")


def test_wrong_names_and_places(tmp_path):
    with pytest.raises(ValueError, match=r"data 'flickr30k': train: unknown split 'trian': did you mean 'train'"):
        Flickr30K(root=tmp_path, train=("trian",))
    source = Flickr30K(root=flickr30k(tmp_path))
    with pytest.raises(ValueError, match=r"data 'flickr30k': unknown task 'vqa'"):
        source.load("vqa", "train")
    with pytest.raises(ValueError, match=r"unknown split 'dev'"):
        source.load("retrieval", "dev")
    with pytest.raises(DataError, match=r"gone: there is no such folder"):
        Flickr30K(root=tmp_path / "gone").load("retrieval", "train")
    with pytest.raises(DataError, match=r"expected flickr30k_train\.json or flickr30k_karpathy_train\.json in it"):
        Flickr30K(root=tmp_path, form="xvlm").load("retrieval", "train")
    write(tmp_path / "other/dataset_flickr30k.json", {"images": []})
    with pytest.raises(DataError, match=r"which is meant"):
        source.load("retrieval", "train")
    apart = Flickr30K(
        root=tmp_path / "other", annotations=tmp_path / "karpathy", pictures=tmp_path / "flickr30k-images"
    )
    assert len(apart.load("retrieval", "train")) == 2


def test_coco_trains_on_restval_too_and_keeps_every_caption(tmp_path):
    rows = [("train", "train2014", 5), ("restval", "val2014", 6), ("test", "val2014", 7)]
    images = [karpathy_image(f"COCO_{f}_{i:012d}.jpg", s, [f"caption {k}\n" for k in range(n)], filepath=f, cocoid=i)
              for i, (s, f, n) in enumerate(rows)]  # fmt: skip
    write(tmp_path / "dataset_coco.json", {"images": images})
    for image in images:
        picture(tmp_path / "images" / image["filepath"] / image["filename"])
    source = COCO(root=tmp_path)
    assert [len(c) for c in source.load("retrieval", "train")["captions"]] == [5, 6]
    test = source.load("retrieval", "test")
    assert test["image_id"][:] == ["2"] and test[0]["captions"][0] == "caption 0\n" and len(test[0]["captions"]) == 7


def test_lists_of_xvlm_and_blip(tmp_path):
    for i in (1, 2):
        picture(tmp_path / f"val2014/COCO_val2014_{i:012d}.jpg")
    one, two = ("val2014/COCO_val2014_000000000001.jpg", "val2014/COCO_val2014_000000000002.jpg")
    write(tmp_path / "coco_karpathy_train.json", [
        {"image": one, "caption": "A <person>, here.", "image_id": "coco_1"},
        {"image": two, "caption": "Other", "image_id": "coco_2"},
        {"image": one, "caption": "Well-worn!", "image_id": "coco_1"},
    ])  # fmt: skip
    write(tmp_path / "coco_karpathy_test.json", [{"image": two, "caption": ["b", "a"]}])
    source = COCO(root=tmp_path, form="xvlm", wording="xvlm")
    train = source.load("retrieval", "train")
    assert train["captions"][:] == [["a person here", "well worn"], ["other"]]
    assert train["image_id"][:] == ["coco_1", "coco_2"]
    test = source.load("captioning", "test")
    assert test["image_id"][:] == ["2"] and test["captions"][:] == [["b", "a"]]
    each = COCO(root=tmp_path, form="xvlm", wording="blip", train_rows="caption").load("captioning", "train")
    assert each["captions"][:] == [["a <person>, here"], ["other"], ["well-worn"]]
    write(tmp_path / "coco_karpathy_train.json", [{"image": one, "caption": "?!", "image_id": "x"}])
    with pytest.raises(DataError, match=r"coco_karpathy_train\.json, entry\[0\]: nothing is left of '\?!'"):
        source.load("retrieval", "train")


@pytest.mark.parametrize(("ids", "captions"), [("7\n9\n", 10), ("7\n7\n9\n", 3)])
def test_captions_and_ids_a_line(tmp_path, ids, captions):
    lines = [f"caption {i} " for i in range(captions)]
    write(tmp_path / "precomp/dev_caps.txt", "\n".join(lines) + "\n")
    write(tmp_path / "precomp/dev_ids.txt", ids)
    write(tmp_path / "id_mapping.json", {"7": "val2014/a.jpg", "9": "val2014/b.jpg"})
    for name in "ab":
        picture(tmp_path / f"val2014/{name}.jpg")
    table = COCO(root=tmp_path, form="precomp").load("retrieval", "validation")
    assert table["image_id"][:] == ["7", "9"] and names(table) == ["a.jpg", "b.jpg"]
    cut = 5 if captions == 10 else 2
    told = [line.strip() for line in lines]
    assert table["captions"][:] == [told[:cut], told[cut:]]
    write(tmp_path / "precomp/dev_caps.txt", "\n".join([*lines, "one more"]))
    with pytest.raises(DataError, match=rf"dev_caps\.txt: {captions + 1} captions, and dev_ids\.txt has"):
        COCO(root=tmp_path, form="precomp").load("retrieval", "validation")


def test_official_files_of_captions_are_joined_by_id(tmp_path):
    picture(tmp_path / "val2014/a.jpg")
    picture(tmp_path / "val2014/b.jpg")
    content = {
        "images": [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "b.jpg"}],
        "annotations": [{"id": 3, "image_id": 6, "caption": "six"}, {"id": 1, "image_id": 5, "caption": "five\n"},
                        {"id": 2, "image_id": 6, "caption": "again"}],
    }  # fmt: skip
    path = write(tmp_path / "annotations/captions_val2014.json", content)
    table = COCOCaptions(root=tmp_path).load("captioning", "test")
    assert table["captions"][:] == [["five\n"], ["six", "again"]] and table["caption_ids"][:] == [["1"], ["3", "2"]]
    for fault, message in (
        ({"id": 4, "image_id": 8, "caption": "x"}, r"annotations\[3\]: the caption is of the picture '8'"),
        ({"id": 3, "image_id": 5, "caption": "x"}, r"annotations\[3\]: the id of a caption '3' stands twice"),
    ):
        write(path, {**content, "annotations": [*content["annotations"], fault]})
        with pytest.raises(DataError, match=message):
            COCOCaptions(root=tmp_path).load("captioning", "test")


# --- Flickr8K ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def flickr8k(tmp_path):
    captions = [
        "",
        "11_ab.jpg#1\tSecond . ",
        "11_ab.jpg#0\tFirst .",
        "22_cd.jpg#0\tA",
        "e44_01.jpg#0\tOther\te44_01.jpg#1\tx",
    ]
    write(tmp_path / "Flickr8k_text/Flickr8k.token.txt", "\n".join(captions) + "\n")
    for split, listed in (("train", "11_ab.jpg\n\n e44_01.jpg\n"), ("dev", "22_cd.jpg"), ("test", "22_cd.jpg")):
        write(tmp_path / f"Flickr8k_text/Flickr_8k.{split}Images.txt", listed)
    for name in ("11_ab", "22_cd"):
        picture(tmp_path / f"Flicker8k_Dataset/{name}.jpg")
    return tmp_path


def test_flickr8k_passes_over_another_sets_names_but_misses_its_own_pictures(flickr8k):
    train = Flickr8K(root=flickr8k).load("retrieval", "train")
    assert train["captions"][:] == [["First .", "Second ."]] and train["image_id"][:] == ["11_ab"]
    (flickr8k / "Flicker8k_Dataset/11_ab.jpg").unlink()
    with pytest.raises(DataError, match=r"Flickr_8k\.trainImages\.txt, line 1: the picture '11_ab\.jpg' is not there"):
        Flickr8K(root=flickr8k).load("retrieval", "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("22_cd.jpg#1\tone\t22_cd.jpg#2\ttwo", r"token\.txt, line 7: two captions run together"),
        ("22_cd.jpg#0\tagain", r"line 7: the number of a caption '22_cd\.jpg#0' stands twice"),
        ("22_cd.jpg a caption", r"line 7: expected `NAME\.jpg#n`, a tab and a caption"),
    ],
)
def test_flickr8k_names_a_broken_line(flickr8k, line, message):
    with (flickr8k / "Flickr8k_text/Flickr8k.token.txt").open("a") as file:
        file.write("\n" + line)
    with pytest.raises(DataError, match=message):
        Flickr8K(root=flickr8k).load("retrieval", "test")


def test_a_recipe_resolves_and_loads_a_published_set(flickr8k):
    from trimtab.data.sources import SOURCES
    from trimtab.experiments.assembly import check
    from trimtab.experiments.recipe import build, expand
    from trimtab.experiments.schema import RecipeError

    data = {"name": "flickr8k", "root": str(flickr8k), "train": ["train", "val"]}
    raw = {
        "backbone": {"name": "tiny-clip"},
        "task": {"name": "retrieval"},
        "methods": [{"name": "full"}],
        "data": data,
    }
    check(expand(raw, "made", ())[0])
    source = build(SOURCES["flickr8k"], {k: v for k, v in data.items() if k != "name"}, "data")
    assert [len(source.load("retrieval", split)) for split in ("train", "validation", "test")] == [2, 1, 1]
    data["test"] = ["tset"]
    with pytest.raises(RecipeError, match=r"data 'flickr8k': test: unknown split 'tset': did you mean 'test'"):
        check(expand(raw, "made", ())[0])


@pytest.mark.parametrize(
    ("written", "xvlm", "blip"),
    [
        ("A well-worn horse (black), isn't?", "a well worn horse black isnt", "a well-worn horse black , isn't?"),
        (" Two  cats/dogs ;\n", "two cats dogs", "two cats/dogs"),
        ("<person>: one two three four five", "person one two three four five", "<person> one two three four five"),
    ],
)  # fmt: skip
def test_wordings_of_captions(written, xvlm, blip):
    assert wording.caption(written, "as written") == written
    assert wording.caption(written, "xvlm") == xvlm and wording.caption(written, "blip") == blip
    assert wording.caption(written, "xvlm", 2) == " ".join(xvlm.split(" ")[:2])


def test_wordings_of_questions():
    assert wording.question("Is it  well-worn, (or) not?  ", "xvlm") == "is it  well worn or not"
    assert wording.question("Is it  well-worn, (or) not?  ", "blip") == "is it  well-worn, or not?"
    assert wording.question("one two three", "blip", 2) == "one two"
    assert wording.caption("?!", "blip") == "?"
    with pytest.raises(ValueError, match="nothing is left"):
        wording.caption("?!", "xvlm")
