"""Weights on disk at the size of what is not zero: safetensors files of bitmasks and packed values.

A tensor NAME of n elements with k non-zeros becomes, where that is smaller,

    NAME.bitmask   uint8 (ceil(n / 8),)     which elements are there, in row-major order, the first in the lowest bit
    NAME.values    its own type, (k,)       the elements that are there, in the same order

and is stored plainly as NAME otherwise. An element is left out only if all its bits are zero, so that -0.0 and every
NaN come back as they were. The safetensors metadata of each file has one key, `trimtab.sparse`, with JSON:

    {"version": 1, "tensors": {"w": [3735928559, "float32", [512, 128]], "b": 305419896, "tied": {"same_as": "w"}}}

A list is a tensor stored sparse: checksum, type, shape. A number is one stored plainly: its checksum. The checksum is
the CRC-32 of `NAME|TYPE|SHAPE` (`w|float32|512,128`, UTF-8), then the bitmask's bytes, then the values'; of a plain
tensor, the text and its bytes. It is checked when a tensor is read, so that reading stays lazy.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.storage.bits import pack, unpack
from trimtab.storage.shards import DENSE, SHARD_SIZE, ShardWriter, find, open_safetensors, storable

SUFFIX = ".sparse.safetensors"
KEY = "trimtab.sparse"
VERSION = 1
_PIECE = 1 << 20  # elements handled at once: positions take 8 bytes an element, more than the weights themselves
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes an element -> its bits as a number
_HEADER = 120  # about what a second entry and the longer note of a sparse tensor take in a header, besides its name


@dataclass
class Sizes:
    """What weights hold and take.

    Attributes:
        tensors: stored tensors; one that only repeats another is not counted.
        packed: those of them that are stored sparse.
        weights: their elements.
        nonzeros: elements with any bit set.
        dense_bytes: elements times element size.
        bound_bytes: non-zeros times element size, and one bit an element.
        file_bytes: of all weight files, headers included, and of the index.
    """

    tensors: int = 0
    packed: int = 0
    weights: int = 0
    nonzeros: int = 0
    dense_bytes: int = 0
    bound_bytes: int = 0
    file_bytes: int = 0

    def add(self, shape: Iterable[int], element_size: int, nonzeros: int, packed: bool) -> None:
        """Count one tensor."""
        count = torch.Size(shape).numel()
        self.tensors += 1
        self.packed += packed
        self.weights += count
        self.nonzeros += nonzeros
        self.dense_bytes += count * element_size
        self.bound_bytes += nonzeros * element_size + -(-count // 8)


def save_file(tensors: Mapping[str, Tensor], folder: str | Path, max_shard_size: int | str = SHARD_SIZE) -> Sizes:
    """Write tensors of any shapes and types into a folder in the sparse layout.

    Names that stand for one and the same memory are stored once. The folder may hold other files. What is interrupted
    leaves nothing that could be taken for finished.

    Args:
        tensors: name -> tensor.
        folder: it is made if it is not there.
        max_shard_size: bytes a file, such as 10**9 or "500MB" (powers of ten).

    Returns:
        What was written.

    Raises:
        FileExistsError: if the folder has weights in this layout.
        ValueError: if safetensors does not store tensors of a kind (quantised, sparse in memory), or the size is wrong.
        OSError: if the files cannot be written (the disk is full).
    """
    with SparseWriter(Path(folder), max_shard_size) as writer:
        writer.add(tensors)
    writer.sizes.file_bytes = stored_bytes(Path(folder), SUFFIX)
    return writer.sizes


def load_file(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a folder that `save_file` wrote, bit for bit; names that were stored once share their memory.

    Raises:
        FileNotFoundError, ValueError: as `SparseReader`.
    """
    with SparseReader(folder) as reader:
        return reader.tensors()


def sizes(folder: str | Path) -> Sizes:
    """What the weights of a folder hold and take. Non-zeros of plain tensors are counted, so that those are read.

    Raises:
        FileNotFoundError, ValueError: as `SparseReader`.
    """
    with SparseReader(folder) as reader:
        out = Sizes(file_bytes=stored_bytes(Path(folder), SUFFIX))
        for name in reader:
            if reader.same_as(name) is None:
                out.add(*reader.counts(name))
    return out


def is_sparse(folder: str | Path) -> bool:
    """Whether a folder has weights in the sparse layout, finished or not.

    Raises:
        ValueError: if it has dense ones too, which may be of another model.
    """
    mine = sorted(Path(folder).glob(f"model*{SUFFIX}*"))
    dense = sorted(p for p in Path(folder).glob(f"model*{DENSE}*") if p not in mine)
    if mine and dense:
        raise ValueError(f"{folder}: has weights in two layouts, {mine[0].name} and {dense[0].name}: delete the older")
    return bool(mine)


def stored_bytes(folder: Path, suffix: str) -> int:
    """Bytes of the weight files with a suffix and of their index; as errors `trimtab.storage.shards.find`."""
    files, where = find(folder, suffix)
    index = [folder / f"model{suffix}.index.json"] if where is not None else []
    return sum(file.stat().st_size for file in files + index)


def aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> earlier name of the same elements of the same memory; only those that repeat an earlier one."""
    first: dict[tuple, str] = {}
    out = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.is_meta:
            continue
        signs = (tensor.is_conj(), tensor.is_neg())
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), signs)
        if (known := first.setdefault(key, name)) != name:
            out[name] = known
    return out


def count_nonzeros(tensor: Tensor) -> int:
    """Elements with any bit set (-0.0 is one). Types of less than a byte have no elements to leave out: all of them."""
    return tensor.numel() if "float4" in _dtype(tensor) else int(np.count_nonzero(_integers(tensor)))


def _integers(tensor: Tensor) -> np.ndarray:
    """The elements' bits as integers of their size, (n,), without a copy where the tensor lies contiguous in memory."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_INTEGERS[flat.element_size()]).numpy()


def _checksum(name: str, dtype: str, shape: Iterable[int], *parts: Tensor) -> int:
    value = zlib.crc32(f"{name}|{dtype}|{','.join(map(str, shape))}".encode())
    for part in parts:
        value = zlib.crc32(_integers(part).data, value)
    return value


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class SparseWriter:
    """Writes tensors in the sparse layout, batch after batch, holding one shard in memory; a context manager.

    Attributes:
        sizes: what was added so far; the bytes of the files are not counted.

    Raises:
        FileExistsError, ValueError, OSError: as `save_file`.
    """

    def __init__(self, folder: Path, max_shard_size: int | str = SHARD_SIZE) -> None:
        self.sizes = Sizes()
        self.shards = ShardWriter(folder, SUFFIX, max_shard_size, _metadata)

    def __enter__(self) -> SparseWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.shards.__exit__(*error)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors; those among them that are one and the same are stored once."""
        tensors = dict(tensors)  # what a mapping makes when it is looked at must live while addresses are compared
        same = aliases(tensors)
        for name, tensor in tensors.items():
            if name in same:
                self.shards.put(name, {}, {"same_as": same[name]})
            else:
                self._add(name, tensor)

    def _add(self, name: str, tensor: Tensor) -> None:
        tensor = storable(name, tensor)
        dtype, shape, size = _dtype(tensor), list(tensor.shape), tensor.element_size()
        count = count_nonzeros(tensor)
        left_out = (tensor.numel() - count) * size
        packed = left_out > -(-tensor.numel() // 8) + _HEADER + len(name)
        if packed:
            bits = _integers(tensor)
            mask = np.not_equal(bits, 0)
            values = torch.from_numpy(_gather(bits, mask, count)).view(tensor.dtype)
            bitmask = pack(torch.from_numpy(mask))
            note = [_checksum(name, dtype, shape, bitmask, values), dtype, shape]
            self.shards.put(name, {f"{name}.bitmask": bitmask, f"{name}.values": values}, note)
        else:
            self.shards.put(name, {name: tensor}, _checksum(name, dtype, shape, tensor))
        self.sizes.add(shape, size, count, packed)


def _metadata(notes: dict[str, Any]) -> dict[str, str]:
    # The one key, and no "format": nothing else should take such a file for a plain checkpoint.
    return {KEY: json.dumps({"version": VERSION, "tensors": notes}, separators=(",", ":"), ensure_ascii=False)}


def _gather(bits: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """The elements where the mask is true, (count,)."""
    out, at = np.empty(count, bits.dtype), 0
    for start in range(0, len(bits), _PIECE):
        piece = bits[start : start + _PIECE]
        chosen = piece[np.flatnonzero(mask[start : start + _PIECE])]
        out[at : at + len(chosen)] = chosen
        at += len(chosen)
    return out


def _scatter(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The inverse of `_gather`: zeros of the mask's length, filled in where it is true."""
    out, at = np.zeros(len(mask), values.dtype), 0
    for start in range(0, len(mask), _PIECE):
        places = np.flatnonzero(mask[start : start + _PIECE])
        out[start : start + _PIECE][places] = values[at : at + len(places)]
        at += len(places)
    return out


class SparseReader:
    """Reads a folder that `save_file` wrote, tensor by tensor; a context manager.

    Opening it reads the headers only; a tensor's bytes are read, checked and unpacked when it is asked for.

    Args:
        folder: the folder.

    Raises:
        FileNotFoundError: if there are no weights in this layout, or a shard that the index names is missing.
        ValueError: if a file is truncated, lacks the metadata, is of a newer version, does not hold what its metadata
            or the index say, or if shards lack their index. Messages name the file.
    """

    def __init__(self, folder: str | Path) -> None:
        files, where = find(Path(folder), SUFFIX)
        if not files:
            raise FileNotFoundError(f"{folder}: expected weights in the sparse layout (model{SUFFIX}), found none")
        self._files: dict[str, Any] = {}
        self._notes: dict[str, tuple[Path, Any]] = {}
        for path in files:
            file = self._files[path.name] = open_safetensors(path)
            for name, note in _read_notes(path, file).items():
                if where is not None and where.get(name) != path.name:
                    raise ValueError(f"{path}: holds '{name}', which the index does not look for there; copy it again")
                self._notes[name] = (path, note)
        lost = sorted((where or {}).keys() - self._notes.keys())
        if where and lost:
            raise ValueError(f"{Path(folder) / where[lost[0]]}: lacks '{lost[0]}', which the index looks for there")
        for name in self._notes:
            if (target := self.same_as(name)) is not None and self.same_as(target) is not None:
                raise ValueError(f"{self._notes[name][0]}: '{name}' is tied to '{target}', which is tied itself")

    def __enter__(self) -> SparseReader:
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.clear()  # safetensors closes a file with its last reference

    def __iter__(self) -> Iterator[str]:
        return iter(self._notes)

    def keys(self) -> list[str]:
        """The names of all tensors, as they were saved."""
        return list(self._notes)

    def same_as(self, name: str) -> str | None:
        """The name under which a tensor is stored, if not its own.

        Raises:
            KeyError: if there is no tensor of that name.
            ValueError: if the other is not there.
        """
        path, note = self._notes[name]
        if not isinstance(note, dict):
            return None
        if note["same_as"] not in self._notes:
            raise ValueError(f"{path}: '{name}' is tied to '{note['same_as']}', which is not there; copy it again")
        return note["same_as"]

    def get_shape(self, name: str) -> list[int]:
        """The shape of a tensor, from headers alone; KeyError if there is none of that name."""
        name = self.same_as(name) or name
        path, note = self._notes[name]
        return list(note[2]) if isinstance(note, list) else self._files[path.name].get_slice(name).get_shape()

    def get_tensor(self, name: str) -> Tensor:
        """A tensor, read, checked and unpacked.

        Raises:
            KeyError: if there is none of that name.
            ValueError: if its bytes are not those that were saved, or bitmask, values and shape do not fit each other.
        """
        name = self.same_as(name) or name
        path, note = self._notes[name]
        file = self._files[path.name]
        if not isinstance(note, list):
            tensor = file.get_tensor(name)
            self._check(name, note, _dtype(tensor), tensor.shape, tensor)
            return tensor
        checksum, dtype, shape = note
        bitmask, values = (file.get_tensor(f"{name}.{part}") for part in ("bitmask", "values"))
        self._check(name, checksum, dtype, shape, bitmask, values)
        try:
            mask = unpack(bitmask, torch.Size(shape)).flatten().numpy()
        except ValueError as error:
            raise ValueError(f"{path}: '{name}': {error}") from error
        count = int(np.count_nonzero(mask))
        if count != len(values) or _dtype(values) != dtype:
            found = f"{len(values)} of {_dtype(values)}"
            raise ValueError(f"{path}: '{name}': its bitmask marks {count} values of {dtype}, found {found}")
        return torch.from_numpy(_scatter(_integers(values), mask)).view(values.dtype).view(shape)

    def _check(self, name: str, expected: int, dtype: str, shape: Iterable[int], *parts: Tensor) -> None:
        found = _checksum(name, dtype, shape, *parts)
        if found != expected:
            what = f"checksum {found:08x}, saved with {expected:08x}"
            raise ValueError(f"{self._notes[name][0]}: '{name}' is damaged ({what}); copy or download it again")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors; names that were stored once share their memory. Errors as `get_tensor`."""
        out = {name: self.get_tensor(name) for name in self if self.same_as(name) is None}
        return {name: out[self.same_as(name) or name] for name in self}

    def counts(self, name: str) -> tuple[list[int], int, int, bool]:
        """Shape, bytes an element, non-zeros of a stored tensor, and whether it is stored sparse; see `Sizes.add`."""
        path, note = self._notes[name]
        if isinstance(note, list):
            (count,) = self._files[path.name].get_slice(f"{name}.values").get_shape()
            return list(note[2]), getattr(torch, note[1]).itemsize, count, True
        tensor = self.get_tensor(name)
        return list(tensor.shape), tensor.element_size(), count_nonzeros(tensor), False


def _read_notes(path: Path, file: Any) -> dict[str, Any]:
    """What a file's metadata says about its tensors, checked against the entries that are in it."""
    raw = (file.metadata() or {}).get(KEY)
    if raw is None:
        raise ValueError(f"{path}: no '{KEY}' in its metadata: not a file in the sparse layout")
    try:
        said = json.loads(raw)
        version, notes = said["version"], dict(said["tensors"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its metadata '{KEY}' cannot be read ({error!r}); copy it again") from error
    if version != VERSION:
        raise ValueError(f"{path}: format version {version!r}, this version of trimtab reads {VERSION}; update trimtab")
    expected = set()
    for name, note in notes.items():
        if not _is_note(note):
            raise ValueError(f"{path}: its metadata says of '{name}' {note!r}, which is no checksum, type and shape")
        if isinstance(note, list):
            expected |= {f"{name}.bitmask", f"{name}.values"}
        elif isinstance(note, int):
            expected.add(name)
    if wrong := sorted(expected ^ set(file.keys())):
        what = "lacks" if wrong[0] in expected else "has, unannounced,"
        raise ValueError(f"{path}: {what} '{wrong[0]}'; copy or download it again")
    return notes


def _is_note(note: Any) -> bool:
    match note:
        case {"same_as": str()} | int():
            return True
        case [int(), str(dtype), [*shape]]:
            known = isinstance(getattr(torch, dtype, None), torch.dtype)
            return known and all(isinstance(side, int) and side >= 0 for side in shape)
    return False
