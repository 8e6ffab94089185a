"""The sparse layout: every bit comes back, files are as small as they should be, damage is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file as load_dense
from safetensors.torch import save_file as save_dense

from trimtab.methods.prune.masks import Masks
from trimtab.storage import sparse
from trimtab.storage.bits import pack, unpack

FILE = "model.sparse.safetensors"
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
          "float8_e4m3fn", "float8_e5m2"]  # fmt: skip


def random(*shape: int, share: float = 0.8, dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    """Random numbers, a share of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 3
    x[torch.rand(shape, generator=generator) < share] = 0
    return x.to(getattr(torch, dtype))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def entries(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k).clone() for k in list(file.keys())}, file.metadata()


@pytest.fixture
def folder(tmp_path):
    sparse.save_file({"w": random(64, 50), "b": random(50, share=0)}, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_comes_back_bit_for_bit(dtype, tmp_path):
    x = random(40, 3, 21, dtype=dtype)
    written = sparse.save_file({"x": x}, tmp_path)
    assert written.packed == 1 and written.nonzeros == int((x.float() if "8_" in dtype else x).ne(0).sum())
    assert same(sparse.load_file(tmp_path)["x"], x)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_negative_zero_and_every_nan_are_no_zeros(dtype, tmp_path):
    x = random(1000, share=0.9, dtype=dtype)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    pattern = x.view(integers)
    pattern[::10] = torch.iinfo(integers).min if x.element_size() > 1 else 0x80  # -0.0
    pattern[5::10] = -3 if x.element_size() > 1 else 0x7F  # a NaN that no operation gives
    pattern[7::10] = 1  # the smallest denormal
    assert x[5].float().isnan() and x[0] == 0
    assert sparse.save_file({"x": x}, tmp_path).packed == 1
    assert same(sparse.load_file(tmp_path)["x"], x)


def test_shapes_views_and_empty_tensors(tmp_path):
    x = random(300, 40)
    tensors = {
        "scalar": torch.tensor(-0.0), "empty": torch.empty(0, 3), "zeros": torch.zeros(500, 2), "odd": random(7, 143),
        "transposed": x.t(), "part": x[3:, ::2], "expanded": x[:1].expand(50, 40), "dense": random(9, 9, share=0),
        "conjugated": random(999, dtype="complex64").conj(),
    }  # fmt: skip
    sparse.save_file(tensors, tmp_path)
    loaded = sparse.load_file(tmp_path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor.resolve_conj()), name
    with sparse.SparseReader(tmp_path) as reader:
        assert {n: reader.get_shape(n) for n in reader} == {n: list(t.shape) for n, t in tensors.items()}


def test_the_layout_is_the_documented_one(tmp_path):
    """Read bit by bit, by the words of the docstring."""
    import zlib

    w, b = random(31, 33), random(7, share=0)
    sparse.save_file({"w": w, "b": b, "tied": w}, tmp_path)
    stored, metadata = entries(tmp_path / FILE)
    assert stored.keys() == {"w.bitmask", "w.values", "b"} and metadata.keys() == {"trimtab.sparse"}
    said = json.loads(metadata["trimtab.sparse"])
    assert said["version"] == 1 and said["tensors"]["tied"] == {"same_as": "w"}
    out, at = [], 0
    for i in range(w.numel()):
        there = stored["w.bitmask"][i // 8].item() >> (i % 8) & 1
        out.append(stored["w.values"][at].item() if there else 0.0)
        at += there
    assert torch.equal(torch.tensor(out).view(31, 33), w) and at == len(stored["w.values"])
    crc = zlib.crc32(b"w|float32|31,33" + bits(stored["w.bitmask"]) + bits(stored["w.values"]))
    assert said["tensors"]["w"] == [crc, "float32", [31, 33]]
    assert said["tensors"]["b"] == zlib.crc32(b"b|float32|7" + bits(b))


def test_bits_are_those_of_masks_in_runs():
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 0, 1], dtype=torch.bool)
    assert pack(mask).tolist() == [0b10000001, 0b10]
    assert torch.equal(unpack(pack(mask), torch.Size([5, 2])), mask.view(5, 2))
    assert torch.equal(Masks({"x": mask}).packed()["x"], pack(mask))


@pytest.mark.parametrize("share", [0.63, 0.75, 0.90])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_are_within_two_percent_of_the_bound(share, dtype, tmp_path):
    tensors = {f"layers.{i}.weight": random(768, 192, share=share, dtype=dtype, seed=i) for i in range(4)}
    tensors |= {f"layers.{i}.bias": random(768, share=0, seed=i) for i in range(4)}
    sizes = sparse.save_file(tensors, tmp_path)
    bound = sum(int(t.ne(0).sum()) * t.element_size() + t.numel() / 8 for t in tensors.values())
    on_disk = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert sizes == sparse.sizes(tmp_path)
    assert (sizes.file_bytes, sizes.bound_bytes) == (on_disk, bound)
    assert on_disk <= 1.02 * bound
    assert sizes.dense_bytes == sum(t.numel() * t.element_size() for t in tensors.values())


def test_what_would_not_shrink_is_stored_plainly(tmp_path):
    ones = torch.ones(800, dtype=torch.int8)
    ones[::10] = 0
    tensors = {"none": random(512, share=0), "few": torch.zeros(30), "an_eighth": ones}
    assert sparse.save_file(tensors, tmp_path).packed == 0
    assert entries(tmp_path / FILE)[0].keys() == tensors.keys()


@pytest.mark.parametrize("zeros", range(20, 100, 4))
def test_a_tensor_is_stored_sparse_exactly_where_the_file_gets_smaller(zeros, tmp_path, monkeypatch):
    """Give or take what rounding the header up to eight bytes hides."""
    x = torch.ones(200)
    x[:zeros] = 0
    chosen = sparse.save_file({"x": x}, tmp_path / "chosen").file_bytes
    monkeypatch.setattr(sparse, "_HEADER", 10**9)
    plain = sparse.save_file({"x": x}, tmp_path / "plain").file_bytes
    monkeypatch.setattr(sparse, "_HEADER", -(10**9))
    packed = sparse.save_file({"x": x}, tmp_path / "packed").file_bytes
    assert chosen <= min(plain, packed) + 32


def test_one_memory_is_stored_once_and_shared_again(tmp_path):
    w = random(200, 100)
    sizes = sparse.save_file({"a": w, "b": w, "c": w.clone(), "d": w[:100]}, tmp_path)
    assert sizes.tensors == 3
    loaded = sparse.load_file(tmp_path)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() != loaded["c"].data_ptr()
    assert same(loaded["b"], w) and same(loaded["d"], w[:100])


def test_names_that_look_like_parts_of_another(tmp_path):
    tensors = {"w": random(400), "w.bitmask": random(300), "w.values": torch.arange(5), "w.values.values": random(9)}
    sparse.save_file(tensors, tmp_path)
    loaded = sparse.load_file(tmp_path)
    assert loaded.keys() == tensors.keys() and all(same(loaded[n], t) for n, t in tensors.items())


def test_shards_and_their_index(tmp_path):
    tensors = {f"t{i}": random(100, 100, seed=i) for i in range(6)}
    sparse.save_file(tensors, tmp_path, max_shard_size="25KB")
    shards = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{i:05}-of-00003.sparse.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / f"{FILE}.index.json").read_text())
    assert index["weight_map"]["t0"] == shards[0] and index["weight_map"]["t5"] == shards[-1]
    assert all((tmp_path / s).stat().st_size < 25_000 for s in shards)
    loaded = sparse.load_file(tmp_path)
    assert all(same(loaded[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("size", ["0", "2XB", "-5", "", 0])
def test_a_wrong_shard_size_is_refused(size, tmp_path):
    with pytest.raises(ValueError, match="expected a size such as 500MB"):
        sparse.save_file({"w": random(10)}, tmp_path, max_shard_size=size)


def test_the_same_tensors_give_the_same_bytes(folder, tmp_path):
    sparse.save_file({"w": random(64, 50), "b": random(50, share=0)}, tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_reading_is_lazy(tmp_path):
    """Damage in one tensor does not keep another from being read, and a header answers for shapes."""
    sparse.save_file({"a": random(64, 64), "b": random(64, 64, seed=1)}, tmp_path)
    damage(tmp_path / FILE, "b.values")
    with sparse.SparseReader(tmp_path) as reader:
        assert same(reader.get_tensor("a"), random(64, 64)) and reader.get_shape("b") == [64, 64]
        with pytest.raises(ValueError, match="'b' is damaged"):
            reader.get_tensor("b")
        with pytest.raises(KeyError):
            reader.get_tensor("c")


def test_changing_a_loaded_tensor_leaves_the_file(folder):
    for tensor in sparse.load_file(folder).values():
        tensor.fill_(7)
    assert same(sparse.load_file(folder)["b"], random(50, share=0))


def damage(path: Path, entry: str) -> None:
    """Flip one bit in the middle of an entry."""
    raw = bytearray(path.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    start, end = json.loads(raw[8 : 8 + header])[entry]["data_offsets"]
    raw[8 + header + (start + end) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("entry", ["w.bitmask", "w.values", "b"])
def test_a_flipped_bit_is_refused_by_name(entry, folder):
    damage(folder / FILE, entry)
    with pytest.raises(ValueError, match=f"{FILE}: '{entry[0]}' is damaged .checksum"):
        sparse.load_file(folder)


def test_no_flipped_bit_anywhere_is_taken_for_the_saved_tensors(tmp_path):
    """Header, metadata, padding and data: after any one flip, loading gives an error or the very same tensors."""
    tensors = {"w": random(11, 97), "b": random(3, share=0)}
    sparse.save_file(tensors, tmp_path)
    path = tmp_path / FILE
    raw = path.read_bytes()
    refused = 0
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            loaded = sparse.load_file(tmp_path)
        except (ValueError, FileNotFoundError) as error:
            assert FILE in str(error)
            refused += 1
        else:
            assert loaded.keys() == tensors.keys() and all(same(loaded[n], t) for n, t in tensors.items())
    assert refused > 0.98 * len(raw)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused_by_name(keep, folder):
    raw = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(raw[:keep])
    with pytest.raises(ValueError, match=f"{FILE}: not a whole safetensors file"):
        sparse.load_file(folder)


def resave(folder: Path, change) -> None:
    """Write the file again with its entries or its metadata changed, as valid safetensors."""
    stored, metadata = entries(folder / FILE)
    said = json.loads(metadata["trimtab.sparse"])
    result = change(stored, said)
    save_dense(stored, folder / FILE, {"trimtab.sparse": json.dumps(said)} if result is None else result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored, said: {}, "no 'trimtab.sparse' in its metadata"),
        (lambda stored, said: {"trimtab.sparse": "{"}, "its metadata 'trimtab.sparse' cannot be read"),
        (lambda stored, said: {"trimtab.sparse": '{"version": 1, "tensors": 3}'}, "cannot be read"),
        (lambda stored, said: said.update(version=2), "format version 2, this version of trimtab reads 1"),
        (lambda stored, said: said["tensors"].update(w=[1, "float33", [2]]), "which is no checksum, type and shape"),
        (lambda stored, said: said["tensors"].pop("b") and None, "has, unannounced, 'b'"),
        (lambda stored, said: stored.pop("b") is None or None, "lacks 'b'"),
        (lambda stored, said: said["tensors"].update(t={"same_as": "x"}), "'t' is tied to 'x', which is not there"),
        (lambda stored, said: said["tensors"].update(t={"same_as": "t"}), "'t' is tied to 't', which is tied itself"),
        (lambda stored, said: said["tensors"]["w"].__setitem__(2, [64, 51]), "'w' is damaged"),
    ],
)
def test_files_that_say_other_than_they_hold_are_refused(change, message, folder):
    resave(folder, lambda stored, said: result if isinstance(result := change(stored, said), dict) else None)
    with pytest.raises(ValueError, match=message) as error:
        sparse.load_file(folder)
    assert FILE in str(error.value)


def checksummed(stored, said, name="w"):
    _, dtype, shape = said["tensors"][name]
    said["tensors"][name][0] = sparse._checksum(name, dtype, shape, stored[f"{name}.bitmask"], stored[f"{name}.values"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.update({"w.values": stored["w.values"][:-1].clone()}), "its bitmask marks"),
        (lambda stored: stored["w.bitmask"].fill_(0), "its bitmask marks 0 values of float32, found"),
        (lambda stored: stored.update({"w.values": stored["w.values"].double()}), "found .* of float64"),
        (lambda stored: stored.update({"w.bitmask": stored["w.bitmask"][:-1].clone()}), "takes 400 bytes, found 399"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(change, message, folder):
    """By a writer that is wrong: checksums are right."""
    resave(folder, lambda stored, said: (change(stored), checksummed(stored, said), None)[-1])
    with pytest.raises(ValueError, match=f"{FILE}: 'w': .*{message}"):
        sparse.load_file(folder)


@pytest.fixture
def sharded(tmp_path):
    sparse.save_file({f"t{i}": random(100, 100, seed=i) for i in range(3)}, tmp_path / "sharded", 10_000)
    return tmp_path / "sharded"


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.sparse.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.sparse.safetensors: no such file, though"):
        sparse.load_file(sharded)


def test_shards_without_an_index_are_an_unfinished_save(sharded):
    (sharded / f"{FILE}.index.json").unlink()
    with pytest.raises(ValueError, match="3 shards .* an unfinished save"):
        sparse.load_file(sharded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not an index of shards"),
        ('{"weight_map": {"t0": "../model-00001-of-00003.sparse.safetensors"}}', "not an index of shards"),
        ('{"weight_map": {"t1": "model-00001-of-00003.sparse.safetensors"}}', "which the index does not look for"),
        ('{"weight_map": {"t0": "model-00001-of-00003.sparse.safetensors", '
         '"t9": "model-00001-of-00003.sparse.safetensors"}}', "lacks 't9'"),
    ],
)  # fmt: skip
def test_an_index_that_is_wrong_is_refused(text, message, sharded):
    (sharded / f"{FILE}.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        sparse.load_file(sharded)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected weights in the sparse layout"):
        sparse.load_file(tmp_path)


def test_saving_twice_into_a_folder_is_refused(folder, sharded):
    for there in (folder, sharded):
        before = {f.name: f.read_bytes() for f in there.iterdir()}
        with pytest.raises(FileExistsError, match="has weights already"):
            sparse.save_file({"w": random(5)}, there)
        assert {f.name: f.read_bytes() for f in there.iterdir()} == before


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, dtype=torch.complex128), torch.eye(3).to_sparse(), torch.empty(3, device="meta")]
)
def test_what_safetensors_does_not_store_is_refused_by_name(tensor, tmp_path):
    with pytest.raises(ValueError, match="'odd': safetensors stores no"):
        sparse.save_file({"w": random(500), "odd": tensor}, tmp_path / "out", max_shard_size=1)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    """The process may write 30 kB to a file: the second shard is larger."""
    code = (
        "import resource, sys, torch; from trimtab.storage import sparse\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n"
        "sparse.save_file({'a': torch.ones(5000), 'b': torch.ones(50000)}, sys.argv[1], 25000)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, timeout=300)
    assert "OSError" in done.stderr and "File too large" in done.stderr and str(tmp_path / "out") in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def stop(self, target):
        written.append(target)
        if len(written) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    rename = Path.replace
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        sparse.save_file({f"t{i}": random(100, 100, seed=i) for i in range(3)}, tmp_path, 10_000)
    assert len(written) == 2 and list(tmp_path.iterdir()) == []


def test_no_file_is_taken_for_a_dense_checkpoint(folder):
    """Whoever looks for model.safetensors finds none, and the entries do not have the names of weights."""
    assert not (folder / "model.safetensors").exists()
    assert "w" not in load_dense(folder / FILE)
