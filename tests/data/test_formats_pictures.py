from __future__ import annotations

import json

import pytest

from tests.data import official
from trimtab.data.formats.cc3m import CC3M, SBU, WebDataset, tsv
from trimtab.data.formats.visual_genome import VisualGenome
from trimtab.data.reading import DataError, Kept, RowError

# --- pictures and texts -----------------------------------------------------------------------------------------------


def test_a_tsv_has_no_quoting(tmp_path):
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_text('"a quote\thttp://x/1\n two blanks \thttp://x/2\né <person>\thttp://x/3\n', encoding="utf-8")
    assert [c for c, _ in tsv(path, Kept())] == ['"a quote', " two blanks ", "é <person>"]
    path.write_text("a\tb\nno tab\n")
    with pytest.raises(RowError, match=r"tsv, line 2: expected a caption, a tab and an address, found 'no tab'"):
        list(tsv(path, Kept()))


def samples(count: int, start: int = 0) -> dict[str, dict[str, bytes]]:
    return {f"{start + i:05d}": {"json": b"{}", "txt": f"text {start + i}".encode(), "jpg": official.jpeg()}
            for i in range(count)}  # fmt: skip


def test_shards_are_read_as_a_stream(tmp_path):
    """Only as far as rows are asked for: the second shard is broken and not looked at, until it is reached."""
    official.shard(tmp_path / "00000.tar", samples(4))
    (tmp_path / "00001.tar").write_bytes(b"no tar file" * 100)
    table = WebDataset(root=tmp_path, rows=3, validation=1).load("retrieval", "train")
    assert table["captions"][:] == [["text 0"], ["text 1"]] and table[0]["image"].size == (16, 12)
    assert WebDataset(root=tmp_path, rows=3, validation=1).load("retrieval", "test")["captions"][:] == [["text 2"]]
    with pytest.raises(DataError, match=r"00001.tar: cannot be read as a tar file"):
        WebDataset(root=tmp_path, rows=5, validation=1).load("retrieval", "train")


@pytest.mark.parametrize("size", [3500, 7 * 1024, 4 * 1024])  # in a member, in a head, between two samples
def test_a_shard_that_is_cut_off_is_named(tmp_path, size):
    parts = {str(i): {"txt": b"t" * 512, "jpg": official.jpeg()[:512].ljust(512)} for i in range(5)}
    path = official.shard(tmp_path / "a.tar", parts)
    path.write_bytes(path.read_bytes()[: size + (100 if size == 7 * 1024 else 0)])
    with pytest.raises(DataError, match=r"a.tar: .*cut"):
        WebDataset(root=tmp_path, rows=None, validation=1).load("retrieval", "train")


def test_a_sample_takes_its_caption_from_txt_or_json(tmp_path):
    picture = official.jpeg()
    parts = {"a": {"jpg": picture, "json": b'{"caption": "from json"}'}, "b": {"jpg": picture, "json": b"{}"},
             "below/c.d": {"seg.jpg": b"", "txt": b"x"}, "e": {"PNG": picture, "txt": b"last"}}  # fmt: skip
    official.shard(tmp_path / "a.tar", parts)
    with pytest.raises(RowError, match=r"a.tar, sample 'b': expected a caption .*found jpg, json"):
        WebDataset(root=tmp_path, validation=1).load("retrieval", "train")
    kept = Kept("skip")
    WebDataset(root=tmp_path).read("retrieval", "train", kept)
    assert kept.table("a")["captions"][:] == [["from json"], ["last"]] and len(kept.left_out) == 2
    assert "sample 'below/c'" in kept.left_out[1]  # a key ends at the first dot of the name


def test_vilt_and_multiflow_lists_of_pictures(tmp_path):
    for name in ("0000001", "0000002"):
        official.picture(tmp_path / "images_train" / "0000" / name)
    rows = [["images_train/0000/0000002", "a"], ["images_train/0000/0000001", "b"], ["images_train/0000/0000002", "c"]]
    (tmp_path / "train_annot.json").write_text(json.dumps(rows))
    table = CC3M(root=tmp_path, form="vilt").table("captioning", "train")
    assert table["captions"][:] == [["a", "c"], ["b"]] and table["image_id"][:] == ["0000002", "0000001"]
    official.picture(tmp_path / "images" / "sbu" / "1" / "x.jpg")
    listed = [{"image": "1/x.jpg", "caption": " kept ", "dataset": "sbu"}]
    (tmp_path / "sbu_pretrain.json").write_text(json.dumps(listed))
    assert SBU(root=tmp_path, form="multiflow").table("matching", "train")["captions"][:] == [[" kept "]]
    (tmp_path / "m/data/pretrain").mkdir(parents=True)  # its own layout, seen from above
    (tmp_path / "sbu_pretrain.json").rename(tmp_path / "m/data/pretrain/sbu_pretrain.json")
    (tmp_path / "images").rename(tmp_path / "m/images")
    assert len(SBU(root=tmp_path, form="multiflow").table("matching", "train")) == 1
    (tmp_path / "train_annot.json").write_text(json.dumps([*rows, ["x"]]))
    with pytest.raises(RowError, match=r"train_annot.json, row \[3\]: expected \[path, caption\]"):
        CC3M(root=tmp_path, form="vilt").table("captioning", "train")


@pytest.fixture
def genome(tmp_path):
    official.picture(tmp_path / "VG_100K_2" / "5.jpg")
    boxes = [(1, 2, 10, 10, "a\ndog"), (35, 2, 10, 10, "beyond the edge"), (3, 3, 5, 0, "flat"), (0, 0, 40, 30, "all")]
    regions = [{"region_id": i, "image_id": 5, "phrase": p, "x": x, "y": y, "width": w, "height": h}
               for i, (x, y, w, h, p) in enumerate(boxes)]  # fmt: skip
    (tmp_path / "region_descriptions.json").write_text(json.dumps([{"id": 5, "regions": regions}]))
    return tmp_path


def test_regions_of_visual_genome(genome):
    with pytest.raises(RowError, match=r"region_descriptions.json, .*corners \[35, 2, 45, 12\] for 'beyond the edge'"):
        VisualGenome(root=genome).table("grounding", "train")
    kept = VisualGenome(root=genome, on_error="skip").table("grounding", "train")
    assert kept["phrase"][:] == ["a\ndog", "all"] and kept["box"][:] == [[1, 2, 11, 12], [0, 0, 40, 30]]
    whole = VisualGenome(root=genome).table("retrieval", "train")
    assert whole["captions"][:] == [["a\ndog", "beyond the edge", "flat", "all"]]


def test_a_bad_picture_of_regions_is_named_or_left_out(genome):
    path = next(genome.rglob("region_descriptions.json"))
    path.write_text(json.dumps([True, *json.loads(path.read_text())]))
    kept = Kept("skip")
    VisualGenome(root=genome).read("grounding", "train", kept)
    assert len(kept) and "entry[0]: expected an object" in kept.left_out[0]
    pretrain = genome / "vg_pretrain.json"
    pretrain.write_text(json.dumps([{"image": "VG_100K_2/5.jpg", "caption": ["a"], "bb": [1.5]}]))
    with pytest.raises(RowError, match=r"vg_pretrain.json, entry\[0\]: expected a box of four numbers"):
        VisualGenome(root=genome, form="multiflow-pretraining").table("grounding", "train")


def test_a_bad_region_of_xvlm_leaves_out_its_picture(genome):
    good = {"image": "VG_100K_2/5.jpg", "caption": "a street",
            "elems": [{"caption": "dog", "bb": [1.9, 2, 3.9, 4], "attributes": ["old", "big"]}]}  # fmt: skip
    bad = {"image": "VG_100K_2/5.jpg", "elems": [*good["elems"], {"caption": "x", "bb": [39, 0, 9, 9]}]}
    (genome / "part-00000").write_text(f"{json.dumps(bad)}\n{json.dumps(good)}\n")
    with pytest.raises(RowError, match=r"part-00000, line 1: expected a box with an area in its picture of 40 x 30"):
        VisualGenome(root=genome, form="xvlm").table("grounding", "train")
    skipping = VisualGenome(root=genome, form="xvlm", on_error="skip", attributes=True).table("grounding", "train")
    assert skipping["phrase"][:] == ["old dog"] and skipping["box"][:] == [[1, 2, 4, 6]]  # cut to whole pixels first


def test_multiflow_cuts_regions_out_for_pretraining(genome):
    row = {"image": "VG_100K_2/5.jpg", "caption": ["dog", "cat"], "bb": [[1, 2, 8, 6], [0, 0, 4, 4]], "dataset": "vg"}
    (genome / "vg_pretrain.json").write_text(json.dumps([row]))
    table = VisualGenome(root=genome, form="multiflow-pretraining").table("pretraining", "train")
    assert [p.size for p in table["image"]] == [(8, 6), (4, 4)] and table["captions"][:] == [["dog"], ["cat"]]
    (genome / "vg_pretrain.json").write_text(json.dumps([row | {"bb": row["bb"][:1]}]))
    with pytest.raises(RowError, match=r"\[0\]: expected a box for each of 2 captions, found 1"):
        VisualGenome(root=genome, form="multiflow-pretraining").table("pretraining", "train")
