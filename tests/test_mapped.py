"""Safetensors files in place: the same tensors as the library reads, and just the rows that are asked for."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.methods.tune.cache import ActivationCache, Column
from trimtab.storage.mapped import Mapped

TENSORS = {
    "maps": torch.arange(40 * 6 * 512).reshape(40, 6, 512).to(torch.float16),
    "scales": torch.rand(1, 1, 512),
    "lengths": torch.arange(40),
    "masks": torch.rand(40, 6) > 0.5,
    "halves": torch.rand(3, 5).bfloat16(),
    "none": torch.zeros(0, 4),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "some.safetensors", metadata={"of": "a test"})
    return tmp_path / "some.safetensors"


def test_tensors_are_those_that_the_library_reads(file):
    found, wanted = Mapped(file).tensors, load_file(file)
    assert found.keys() == wanted.keys() == TENSORS.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)
    assert torch.equal(pickle.loads(pickle.dumps(Mapped(file))).tensors["maps"], wanted["maps"])
    found["lengths"][0] = 7
    assert load_file(file)["lengths"][0] == 0  # the file stays as it was


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked")
def test_what_is_asked_for_are_the_rows_and_nothing_else(file, monkeypatch):
    mapped, raw, asked = Mapped(file), file.read_bytes(), []
    maps, lengths = mapped.tensors["maps"], mapped.tensors["lengths"]
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *which: asked.append(which))
    mapped.ask_for([maps, maps[:, :2], lengths], [11, 39, 0])
    wanted = [value[row] for value in (maps, maps[:, :2], lengths) for row in (11, 39, 0)]
    assert {advice for *_, advice in asked} == {os.POSIX_FADV_WILLNEED}
    assert [raw[start : start + size] for start, size, _ in asked] == [w.numpy().tobytes() for w in wanted]
    mapped.ask_for([mapped.tensors["none"]], [0])
    assert len(asked) == 9
    monkeypatch.setattr("trimtab.storage.mapped.PIECE", 1000)  # a row of the maps has 6,144 bytes
    asked.clear()
    mapped.ask_for([maps], [7])
    assert [size for _, size, _ in asked] == [1000] * 6 + [144]
    assert b"".join(raw[start : start + size] for start, size, _ in asked) == maps[7].numpy().tobytes()


def test_advice_stops_nothing(file, monkeypatch):
    mapped = Mapped(file)
    file.unlink()
    mapped.ask_for([mapped.tensors["maps"]], [3])
    assert torch.equal(mapped.tensors["maps"][3], TENSORS["maps"][3])


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_batch_asks_for_all_that_it_reads_of_rows(precision, tmp_path, monkeypatch):
    columns = {"grids": Column((8, 3, 3), torch.float32, packed=True, drawn=False),
               "maps": Column((5, 16), torch.float32, packed=True, axis=0), "same": Column((), torch.long)}  # fmt: skip

    def compute(view, start, stop):
        made = {n: torch.rand(stop - start, *c.shape).to(c.dtype) for n, c in columns.items()}
        return {n: t for n, t in made.items() if columns[n].drawn or not view}

    cache = ActivationCache(tmp_path, {"of": "a test"}, 12, 2, columns, compute, precision)
    cache.fill()
    for view, file in enumerate(sorted(tmp_path.glob("view-*"))):
        found = sum(t.nbytes for t in load_file(file).values() if len(t) == 12)
        assert found == 12 * cache.bytes_of(view), "what is told is what is written, but for a shard's own scales"
    asked = []
    monkeypatch.setattr(Mapped, "ask_for", lambda self, values, rows: asked.append((self.file.name, values, rows)))
    cache.batch([14, 23], length=3)
    assert [(name[:6], rows) for name, _, rows in asked] == [("view-0", [2, 11]), ("view-1", [2, 11])]
    shapes = [[tuple(v.shape) for v in values] for _, values, _ in asked]
    scales = [(12, 8, 1, 1)] if precision == "int8" else []
    assert shapes == [[(12, 8, 3, 3), *scales], [(12, 3, 16), (12,)]]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are not listed here")
def test_a_mapped_file_is_not_open(file):
    before = len(list(Path("/proc/self/fd").iterdir()))
    several = [Mapped(file) for _ in range(5)]
    several[0].ask_for([several[0].tensors["maps"]], [3])
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_is_no_whole_file_is_refused(file, tmp_path):
    raw, other = file.read_bytes(), tmp_path / "other.safetensors"

    def refused(content, match):
        other.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            Mapped(other)

    for content in (b"", raw[:7], raw[:90], b"\xff" * 9, b"\2" + bytes(7) + b"[]", b"\xff" * 7 + b"\x7f" + raw):
        refused(content, "no header of a safetensors file")
    refused(raw[:-1], f"expected {len(raw)} bytes by its header, found {len(raw) - 1}")
    refused(raw + b" ", "by its header")
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    refused(len(header).to_bytes(8, "little") + header + bytes(4), "expected 8 bytes of 'x'")
    with pytest.raises(FileNotFoundError):
        Mapped(tmp_path / "none")
