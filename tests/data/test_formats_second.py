from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from tests.data import official
from trimtab.data import tables
from trimtab.data.base import SOURCES, Published
from trimtab.data.formats import flowers102
from trimtab.data.formats.cifar import CIFAR10, CIFAR100
from trimtab.data.formats.flowers102 import Flowers102
from trimtab.data.formats.msrvtt import MSRVTT
from trimtab.data.formats.msvd import MSVD
from trimtab.data.formats.refcoco import RefCOCO
from trimtab.data.reading import DataError, Kept, RowError


def test_every_published_set_can_be_recognised():
    for name, cls in SOURCES.items():
        if issubclass(cls, Published):
            assert cls.marks, f"{name}: by which names of files is it known?"
            for patterns in cls.marks.values():
                assert isinstance(patterns, tuple) and all("." in p or "/" in p or "-" in p for p in patterns), name


# --- RefCOCO ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def refs(tmp_path):
    three = [official.ref(1, "train", ["the dog", "left dog"]), official.ref(2, "testA", ["a man"]),
             official.ref(3, "testB", ["red bus"])]  # fmt: skip
    boxes = {101: [1.5, 2, 10, 20.25], 102: [30, 5, 10.75, 5], 103: [0, 0, 4, 4]}
    return official.refer(tmp_path, three, boxes), three, boxes


def test_a_row_is_an_expression_with_the_corners_of_its_box(refs):
    root, *_ = refs
    train = RefCOCO(root=root).load("grounding", "train")
    assert train["phrase"][:] == ["the dog", "left dog"] and set(train["ref_id"]) == {"1"}
    assert train[0]["box"] == [1.5, 2.0, 11.5, 22.25] and train[0]["image"].size == (40, 30)
    test = RefCOCO(root=root).load("grounding", "test")
    assert test["phrase"][:] == ["a man"] and test[0]["box"] == [30.0, 5.0, 40.75, 10.0]  # beyond the right edge, kept
    assert RefCOCO(root=root).table("grounding", "test")["phrase"][:] == ["a man", "red bus"]  # all that begin so


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda refs, boxes: boxes.pop(101),
            r"refs\(unc\).p, ref \[0\]: its annotation 101 is not in .*instances.json",
        ),
        (lambda refs, boxes: boxes.update({101: [1, 2, 0, 5]}), r"ref \[0\]: .*annotations\[0\]: .*with an area"),
        (lambda refs, boxes: boxes.update({101: [41, 2, 5, 5]}), r"ref \[0\]: .*which lies outside"),
        (lambda refs, boxes: refs[0].update(image_id=8), r"ref \[0\]: its picture 8 is not in"),
        (lambda refs, boxes: refs[0].update(sentences=[]), r"ref \[0\]: expected 'sentences' to hold at least one"),
        (
            lambda refs, boxes: refs.append(official.ref(1, "train", ["again"])),
            r"ref \[3\]: the ref_id '1' stands twice",
        ),
        (lambda refs, boxes: refs[0].pop("split"), r"ref \[0\]: expected the field 'split'"),
    ],
)
def test_a_broken_ref_is_named(refs, change, message):
    root, three, boxes = refs
    change(three, boxes)
    official.refer(root, three, boxes)
    with pytest.raises(RowError, match=message):
        RefCOCO(root=root).load("grounding", "train")
    rest = RefCOCO(root=root, on_error="skip").table("grounding", "train", "testB")
    assert "red bus" in rest["phrase"][:]


def test_things_with_one_id_or_none_are_named_or_left_out(refs):
    path = refs[0] / "refcoco/instances.json"
    whole = json.loads(path.read_text())
    for more, message in ((whole["annotations"][0], "the id of annotations '101' stands twice"), (5, "named fields")):
        path.write_text(json.dumps(whole | {"annotations": [*whole["annotations"], more]}))
        with pytest.raises(RowError, match=rf"instances.json, annotations\[3\]: .*{message}"):
            RefCOCO(root=refs[0]).load("grounding", "train")
        kept = Kept("skip")
        RefCOCO(root=refs[0]).read("grounding", "train", kept)
        assert len(kept) == 2 and message in kept.left_out[0]


def test_two_publications_of_refs_in_a_folder_must_be_chosen(refs):
    root, *_ = refs
    (root / "refcoco" / "refs(google).p").write_bytes((root / "refcoco" / "refs(unc).p").read_bytes())
    with pytest.raises(DataError, match=r"found refs\(unc\).p and refs\(google\).p; name one with data.by"):
        RefCOCO(root=root).load("grounding", "train")
    assert len(RefCOCO(root=root, by="unc").load("grounding", "train")) == 2


def mdetr(root, boxes, spans=((0, 3),)):
    name = "COCO_train2014_000000000007.jpg"
    official.picture(root / "train2014" / name)
    (root / "finetune_refcoco_train.json").write_text(json.dumps({
        "images": [{"id": i, "original_id": 7, "file_name": name, "width": 40, "height": 30, "caption": "dog here"}
                   for i in range(2)],
        "annotations": [{"id": i, "image_id": i % 2, "bbox": b, "area": 1.1, "original_id": 5,
                         "tokens_positive": list(spans)} for i, b in enumerate(boxes)],
    }))  # fmt: skip
    return RefCOCO(root=root, form="mdetr")


def test_mdetr_moves_boxes_into_the_picture_in_float32(tmp_path):
    table = mdetr(tmp_path, [[35.1, 20.2, 10, 20], [-1, 0.1, 5.1, 4]]).load("grounding", "train")
    assert table[0]["box"] == [float(np.float32(35.1)), float(np.float32(20.2)), 40.0, 30.0]
    assert table[1]["box"][:1] == [0.0] and table[1]["box"][2] == float(np.float32(-1) + np.float32(5.1))
    assert table[0]["tokens_positive"] == [[0, 3]] and table["image_id"][:] == ["7", "7"]


@pytest.mark.parametrize(
    ("boxes", "spans", "message"),
    [
        ([[1, 1, 0, 5], [1, 1, 5, 5]], [[0, 3]], r"images\[0\]: .*annotations\[0\]: .*a box with an area"),
        ([[1, 1, 5, 5]] * 3, [[0, 3]], r"images\[0\]: expected exactly one annotation .* annotations\[0\] and annot"),
        ([[1, 1, 5, 5]], [[0, 3]], r"images\[1\]: expected exactly one annotation .* found none"),
        ([[1, 1, 5, 5]] * 2, [[3, 90]], r"images\[0\]: expected 'tokens_positive' .* spans of its 8 characters"),
    ],
)
def test_a_phrase_of_mdetr_without_one_good_box_is_named(tmp_path, boxes, spans, message):
    with pytest.raises(RowError, match=message):
        mdetr(tmp_path, boxes, spans).load("grounding", "train")


# --- videos -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def msvd(tmp_path):
    """CR LF in the lists, a name that starts with a dash, a video in a folder below, one that is in no list."""
    for name in ("-a_1_2.avi", "below/b.c_3_4.mp4", "unlisted.avi"):
        path = tmp_path / "clips" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    captions = {"-a_1_2": [["a", "dog"], ["the", "dog", "runs"]], "b.c_3_4": [["a", "cat"]], "unlisted": [["x"]]}
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol=0))
    (tmp_path / "train_list.txt").write_bytes(b"-a_1_2\r\nb.c_3_4\r\n")
    (tmp_path / "val_list.txt").write_bytes(b"b.c_3_4")
    return tmp_path


def test_msvd_has_a_row_a_caption_in_training_and_a_row_a_video_elsewhere(msvd):
    train = MSVD(root=msvd).load("video-retrieval", "train")
    assert train["captions"][:] == [["a dog"], ["the dog runs"], ["a cat"]]
    assert train["video"][2].endswith("clips/below/b.c_3_4.mp4") and train["video_id"][0] == "-a_1_2"
    folded = MSVD(root=msvd, unfold=False).load("video-retrieval", "train")
    assert folded["captions"][:] == [["a dog", "the dog runs"], ["a cat"]]
    assert MSVD(root=msvd).load("video-retrieval", "validation")["captions"][:] == [["a cat"]]


def test_a_video_that_cannot_be_decoded_is_left_out_on_skip(msvd):
    film = official.film(msvd / "clips/below/b.c_3_4.mp4", ["red", "red"])
    kept = Kept("skip")
    MSVD(root=msvd, on_error="skip").read("video-retrieval", "train", kept)  # the other one is an empty file
    assert len(kept) == 1
    [told] = kept.left_out
    assert "train_list.txt, line 1: the video " in told and "-a_1_2.avi: cannot be decoded as a video" in told
    film.write_bytes(film.read_bytes()[:40])
    with film.parent.joinpath("rows.jsonl").open("w") as rows:
        rows.write(json.dumps({"video": film.name, "captions": ["a film"]}))
    with pytest.raises(DataError, match=r"rows.jsonl: holds no rows; .*line 1: the video .*cannot be decoded"):
        tables.read(film.parent / "rows.jsonl", on_error="skip")


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (b"b.c_3_4\n\n", r"val_list.txt, line 2: .*found a blank line"),
        (b"b.c_3_4\nnew\n", r"val_list.txt, line 2: the video 'new' has no captions in .*raw-captions.pkl"),
        (b"b.c_3_4\nb.c_3_4\n", r"line 2: the video 'b.c_3_4' stands twice"),
        (b"-a_1_2\nunlisted", r"line 2: the video 'unlisted' is there twice"),
        (b"gone", r"line 1: the video 'gone' is not in"),
    ],
)
def test_a_bad_line_of_a_list_of_videos_is_named(msvd, listed, message):
    (msvd / "val_list.txt").write_bytes(listed)
    (msvd / "clips" / "below" / "unlisted.mp4").write_bytes(b"")
    captions = pickle.loads((msvd / "raw-captions.pkl").read_bytes()) | {"gone": [["x"]]}
    (msvd / "raw-captions.pkl").write_bytes(pickle.dumps(captions))
    with pytest.raises(RowError, match=message):
        MSVD(root=msvd).load("video-retrieval", "validation")


@pytest.fixture
def msrvtt(tmp_path):
    for name in ("video1.mp4", "video2.webm", "video3.mp4", "video3.webm", "video9.mp4"):
        (tmp_path / name).write_bytes(b"")
    said = [("video2", "two b"), ("video1", "one a"), ("video9", "nine"), ("video2", "two a"), ("video3", "three")]
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps({
        "videos": [{"video_id": f"video{i}", "split": "test"} for i in (1, 2, 3, 9)],  # another protocol's split
        "sentences": [{"video_id": v, "caption": c, "sen_id": i} for i, (v, c) in enumerate(said)],
    }))  # fmt: skip
    (tmp_path / "MSRVTT_train.9k.csv").write_text("video_id\r\nvideo1\r\nvideo2\r\nvideo3\r\n")
    rows = 'key,vid_key,video_id,sentence\nret0,msr9,video9,"a man, a dog, and ""x"""\n'
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text(rows)
    return tmp_path


def test_msr_vtt_takes_its_splits_from_the_csv_and_its_order_from_the_json(msrvtt):
    test = MSRVTT(root=msrvtt).load("video-retrieval", "test")
    assert test["captions"][:] == [['a man, a dog, and "x"']]
    train = MSRVTT(root=msrvtt, validation=0).load("video-retrieval", "train")
    assert [c for (c,) in train["captions"]] == ["two b", "one a", "two a", "three"]
    assert train["video"][0].endswith("video2.webm") and train["video"][3].endswith("video3.mp4")
    folded = MSRVTT(root=msrvtt, validation=0, unfold=False).load("video-retrieval", "train")
    assert folded["captions"][:] == [["one a"], ["two b", "two a"], ["three"]]


def test_a_bad_sentence_of_msr_vtt_is_left_out_on_skip(msrvtt):
    path = next(msrvtt.rglob("MSRVTT_data.json"))
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"sentences": [*whole["sentences"], {"video_id": "video1", "caption": 3}]}))
    with pytest.raises(RowError, match=r"MSRVTT_data.json, sentences\[\d+\]: expected 'caption' to be a string"):
        MSRVTT(root=msrvtt).table("video-retrieval", "train")
    kept = Kept("skip")
    MSRVTT(root=msrvtt).read("video-retrieval", "train", kept)
    assert len(kept) and len(kept.left_out) == 1


def test_msr_vtt_holds_videos_out_not_sentences(msrvtt):
    source = MSRVTT(root=msrvtt, validation=2)
    train, held = (source.load("video-retrieval", s) for s in ("train", "validation"))
    assert set(train["video_id"]) == {"video1"}
    assert held["captions"][:] == [["two b", "two a"], ["three"]]  # one row a video
    assert len(MSRVTT(root=msrvtt, validation=0).load("video-retrieval", "validation")) == 0
    with pytest.raises(DataError, match="expected 'validation' to be from 0 to 2 of the 3 videos"):
        MSRVTT(root=msrvtt, validation=3).load("video-retrieval", "validation")


def test_a_csv_of_videos_without_its_header_is_named(msrvtt):
    (msrvtt / "MSRVTT_train.9k.csv").write_text("video1\nvideo2\n")
    with pytest.raises(DataError, match=r"MSRVTT_train.9k.csv, line 1: expected a header with 'video_id'"):
        MSRVTT(root=msrvtt).load("video-retrieval", "train")


# --- classes ----------------------------------------------------------------------------------------------------------


def test_cifar_pictures_are_planes_and_labels_are_names(tmp_path):
    for i in range(1, 6):
        rows = official.cifar_batch(tmp_path / f"data_batch_{i}", [i % 2, 2], seed=i)
    official.cifar_batch(tmp_path / "test_batch", [1])
    (tmp_path / "batches.meta").write_bytes(official.python2({"label_names": ["plane", "cat", "dog"]}))
    source = CIFAR10(root=tmp_path, validation=3)
    table = source.table("classification", "train")
    assert len(table) == 10 and table["label"][:4] == ["cat", "dog", "plane", "dog"]
    assert (np.asarray(table[9]["image"]) == rows[1].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert list(source.classes()) == ["plane", "cat", "dog"]
    ids = [source.load("classification", s)["image_id"][:] for s in ("train", "validation", "test")]
    assert [len(i) for i in ids] == [7, 3, 1] and not set(ids[0]) & set(ids[1])
    assert len(CIFAR10(root=tmp_path, validation=0).load("classification", "validation")) == 0
    with pytest.raises(DataError, match="expected 'validation' to be from 0 to 9 of the 10 training rows, found 10"):
        CIFAR10(root=tmp_path, validation=10).load("classification", "train")


def test_cifar_100_has_two_kinds_of_labels_and_keys_may_be_bytes(tmp_path):
    official.cifar_batch(tmp_path / "train", [1, 0], column="fine_labels", coarse_labels=[0, 0])
    found = pickle.dumps({b"fine_label_names": [b"crab", b"bee"], b"coarse_label_names": [b"small"]}, protocol=3)
    (tmp_path / "meta").write_bytes(found)
    assert CIFAR100(root=tmp_path).table("classification", "train")["label"][:] == ["bee", "crab"]
    assert CIFAR100(root=tmp_path, labels="coarse").table("classification", "train")["label"][:] == ["small", "small"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"data": np.zeros((2, 3072), np.uint8), "labels": [0]},
            r"row \[1\]: expected a label in 'labels' for each of 2",
        ),
        ({"data": np.zeros((2, 3000), np.uint8), "labels": [0, 0]}, r"rows of 3072 bytes .*found an array \(2, 3000\)"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [3]}, r"row \[0\]: expected a label from 0 to 0, found 3"),
        ({"labels": [3]}, r"test_batch, the batch: expected the field 'data'"),
    ],
)
def test_a_broken_batch_is_named(tmp_path, content, message):
    (tmp_path / "test_batch").write_bytes(official.python2(content))
    (tmp_path / "batches.meta").write_bytes(official.python2({"label_names": ["plane"]}))
    with pytest.raises(DataError, match=message):
        CIFAR10(root=tmp_path).table("classification", "test")


@pytest.fixture
def flowers(tmp_path):
    io = pytest.importorskip("scipy.io")
    for i in range(1, 5):
        official.picture(tmp_path / "jpg" / f"image_{i:05d}.jpg")
    ids = {"trnid": [[3]], "valid": [[1, 4]], "tstid": [[2]]}
    io.savemat(tmp_path / "setid.mat", {k: np.uint16(v) for k, v in ids.items()})
    io.savemat(tmp_path / "imagelabels.mat", {"labels": np.uint8([[1, 102, 21, 2]])}, do_compression=True)
    return tmp_path, io


def test_flowers_are_counted_from_one(flowers):
    root, _ = flowers
    source = Flowers102(root=root)
    assert source.load("classification", "train")["label"][:] == ["fire lily"]
    validation = source.load("classification", "validation")
    assert validation["label"][:] == ["pink primrose", "hard-leaved pocket orchid"]
    assert validation["image_id"][:] == ["image_00001", "image_00004"]
    assert source.load("classification", "test")["label"][:] == ["blackberry lily"] == [source.classes()[101]]
    both = Flowers102(root=root, train=("train", "val")).load("classification", "train")
    assert len(both) == 3 and len(set(flowers102.NAMES)) == 102


def test_a_picture_of_flowers_that_is_not_there_is_named(flowers):
    root, io = flowers
    io.savemat(root / "setid.mat", {"trnid": np.uint16([[3, 99]]), "valid": [[1]], "tstid": [[2]]})
    with pytest.raises(RowError, match=r"setid.mat, trnid\[1\]: expected a picture's number from 1 to 4 .*found 99"):
        Flowers102(root=root).load("classification", "train")
    (root / "setid.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(DataError, match="setid.mat: "):
        Flowers102(root=root).load("classification", "train")


def test_multiflow_numbers_flowers_by_its_own_file(tmp_path):
    official.picture(tmp_path / "jpg" / "a.jpg")
    (tmp_path / "metadata.csv").write_text("idx,class_name\n1,rose\n0,tulip\n")
    (tmp_path / "split.csv").write_text("filename,class,split\na.jpg,rose,train\n")
    source = Flowers102(root=tmp_path, form="csv")
    assert list(source.classes()) == ["tulip", "rose"]
    assert source.load("classification", "train")["label"][:] == ["rose"]
    (tmp_path / "split.csv").write_text("filename,class,split\na.jpg,rosa,train\n")
    with pytest.raises(RowError, match=r"split.csv, line 2: the class 'rosa' is not in"):
        source.load("classification", "train")
