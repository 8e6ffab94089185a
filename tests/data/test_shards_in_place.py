"""Sets larger than memory: pictures stay in their shards, and training reads them when it needs them."""

from __future__ import annotations

import gzip
import io
import tarfile

import pytest
import torch
from PIL import Image

from tests.data import official
from tests.tasks import tiny
from trimtab.data import draws
from trimtab.data.formats.cc3m import CC3M, WebDataset
from trimtab.data.images import ImageError, decode, encoded
from trimtab.data.reading import DataError
from trimtab.experiments import training
from trimtab.experiments.collation import table_print
from trimtab.experiments.schema import TrainingSpec
from trimtab.tasks import TASKS, TaskModel


def jpeg(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (24, 18), (shade, 255 - shade, 40)).save(content, "JPEG")
    return content.getvalue()


@pytest.fixture
def root(tmp_path):
    """Two shards of six samples."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for k in range(2):
        numbers = range(6 * k, 6 * k + 6)
        official.shard(folder / f"{k:05d}.tar", {
            f"{i:05d}": {"json": b"{}", "txt": f"the {tiny.WORDS[i]}".encode(), "jpg": jpeg(20 * i)} for i in numbers
        })  # fmt: skip
    return folder


def loaded(root, split="train", **settings):
    return WebDataset(root=root, rows=None, validation=2, **settings).load("retrieval", split)


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_those_that_are_read_into_memory(root, split):
    held, left = loaded(root, split), loaded(root, split, stream=True)
    assert left["captions"][:] == held["captions"][:] and left["image_id"][:] == held["image_id"][:]
    for a, b in zip(encoded(held), encoded(left), strict=True):
        assert b["image"]["bytes"] is None and decode(a["image"]).tobytes() == decode(b["image"]).tobytes()


def test_where_pictures_lie_is_looked_up_once_until_a_shard_changes(root, monkeypatch):
    first = loaded(root, stream=True)
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *args: pytest.fail("read again"))
        assert loaded(root, stream=True)["captions"][:] == first["captions"][:]
    official.shard(root / "00001.tar", {"new": {"txt": b"sea", "jpg": jpeg(9)}})
    assert loaded(root, "test", stream=True)["captions"][:] == [["the dog"], ["sea"]]


def test_training_gives_the_same_numbers(root):
    found = []
    for stream, workers in ((False, 0), (True, 1)):
        torch.manual_seed(0)
        model = TaskModel(tiny.clip(), TASKS["retrieval"]())
        spec = TrainingSpec(steps=4, batch_size=4, log_every=1, workers=workers, buffer=8)
        found.append([e["loss"] for e in training.fit(model, loaded(root, stream=stream), spec, 0)])
    assert found[0] == found[1] and len(set(found[0])) == 4


def test_what_is_wrong_is_named(root, tmp_path):
    table = encoded(loaded(root, stream=True))
    shard = root / "00000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10500])
    with pytest.raises(ImageError, match=r"00000.tar::00005.jpg::\d+:\d+: cannot be decoded.*shorter"):
        decode(table[5]["image"])
    with pytest.raises(DataError, match=r"00000.tar: .*cut"):
        loaded(root, stream=True)
    shard.unlink()
    with pytest.raises(ImageError, match=r"00000.tar::00000.jpg::.*No such file"):
        decode(table[0]["image"])
    with tarfile.open(root / "00000.tar", "w:gz") as packed:
        packed.add(root / "00001.tar", "a.jpg")
    with pytest.raises(DataError, match=r"00000.tar: cannot be read as a tar file"):
        loaded(root, stream=True)
    with pytest.raises(DataError, match="`stream: true` is for shards"):
        CC3M(root=root, form="vilt", stream=True).table("captioning", "train")


def test_a_buffer_mixes_blocks_of_neighbours():
    order = draws.order(1000, 0, 0, buffer=160)
    assert sorted(order) == list(range(1000)) and order != draws.order(1000, 0, 1, buffer=160)
    first = {i // 10 for i in order[:160]}
    assert len(first) == 16, "whole blocks of ten"
    assert order[:160] != sorted(order[:160]) and len({i // 10 for i in order[:20]}) > 8, "mixed among each other"
    assert draws.order(10, 0, 0, buffer=10) == draws.order(10, 0, 0) and sorted(draws.order(3, 0, 0, 1)) == [0, 1, 2]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("damage", ["bit", "hole", "second archive", "between members"])
def test_a_shard_that_does_not_end_where_it_should_is_refused(root, damage, packed):
    """tarfile takes all of these for the end, and says nothing of the samples behind."""
    shard = root / "00000.tar"
    with tarfile.open(shard) as archive:
        head = archive.getmembers()[9].offset
    whole = bytearray(shard.read_bytes())
    if damage == "bit":
        whole[head + 10] ^= 1
    elif damage == "hole":
        whole[head : head + 512] = bytes(512)
    elif damage == "second archive":
        whole = bytearray(2 * bytes(whole))
    else:
        whole = whole[:head]
    shard.write_bytes(gzip.compress(whole) if packed else whole)
    for stream in (False,) if packed else (False, True):
        with pytest.raises(DataError, match=r"00000\.tar: cannot be read .* byte \d+"):
            loaded(root, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_keys_may_begin_anew_in_each_shard(root, stream):
    (root / "00001.tar").unlink()
    official.shard(root / "00001.tar", {
        f"{i:05d}": {"txt": f"another {i}".encode(), "jpg": jpeg(5 * i + 3)} for i in range(6)
    })  # fmt: skip
    table = loaded(root, stream=stream)
    assert len(table) == 10 and len(set(table["image_id"][:])) == 10  # the two held out are two other pictures


def test_other_pictures_of_the_same_size_are_other_data(root):
    before = table_print(loaded(root, stream=True))
    assert before == table_print(loaded(root, stream=True))
    shard = root / "00000.tar"
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as archive:
        picture = next(m for m in archive.getmembers() if m.name == "00003.jpg")
    content[picture.offset_data + picture.size - 3] ^= 1
    shard.write_bytes(content)
    assert table_print(loaded(root, stream=True)) != before
