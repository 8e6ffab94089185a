"""Safetensors files in place: the same tensors as the library reads, and just the rows that are asked for."""

from __future__ import annotations

import json
import mmap
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

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


class Memory:
    """Writes down what is asked for."""

    def __init__(self):
        self.asked = []

    def madvise(self, advice, start, length):
        assert advice == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0
        self.asked.append((start, length))


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="this system cannot be asked")
def test_what_is_asked_for_holds_the_rows_and_little_else(file):
    mapped, raw, memory = Mapped(file), file.read_bytes(), Memory()
    mapped._memory = memory
    for value, row in ((mapped.tensors["maps"], 11), (mapped.tensors["maps"][:, :2], 39), (mapped.tensors["maps"], 0)):
        mapped.ask_for(value, [row])
        start, length = memory.asked.pop()
        wanted = value[row].numpy().tobytes()
        assert raw[start : start + length].endswith(wanted) and length - len(wanted) < mmap.PAGESIZE
    mapped.ask_for(mapped.tensors["lengths"], [3, 5, 4])
    assert len(memory.asked) == 3
    start, length = memory.asked[1]
    assert raw[start : start + length].endswith((5).to_bytes(8, "little"))


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
