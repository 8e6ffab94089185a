"""Checkpoints as transformers lays them out: one safetensors file, or numbered shards and an index of what is where.

    model.safetensors        or        model-00001-of-00002.safetensors ... and model.safetensors.index.json

`suffix` tells layouts apart: `.safetensors` for dense weights, `.sparse.safetensors` for `trimtab.storage.sparse`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.files import replace_file, system_error
from trimtab.storage.types import NAMES

DENSE = ".safetensors"
SHARD_SIZE = "2GB"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 1000, "500MB" or "2GB" (powers of ten); ValueError if it is no positive size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip(), re.IGNORECASE)
    count = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if count < 1:
        raise ValueError(f"expected a size such as 500MB or 2GB, found {size!r}")
    return count


def open_safetensors(path: Path) -> Any:
    """A safetensors file, opened lazily (only its header is read).

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not a whole safetensors file; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error


def find(folder: Path, suffix: str) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a folder in the layout of that suffix, and the index's map from tensor to file, if any.

    No file and no index means that there are no weights in this layout: ([], None).

    Raises:
        FileNotFoundError: if the index names a shard that is not there.
        ValueError: if the index cannot be read, or there are shards but no index (a save that was interrupted).
    """
    index, single = folder / f"model{suffix}.index.json", folder / f"model{suffix}"
    if single.is_file():
        return [single], None
    if index.is_file():
        where = read_index(index)
        files = [folder / name for name in dict.fromkeys(where.values())]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file, though {index.name} names it; copy the folder again")
        return files, where
    shards = _files(folder, suffix)
    if shards:
        raise ValueError(
            f"{folder}: {len(shards)} shards such as {shards[0]}, but no {index.name}: an unfinished save or copy"
        )
    return [], None


def _files(folder: Path, suffix: str) -> list[str]:
    """Names of the weight files with that suffix, whether an index names them or not."""
    name = re.compile(rf"model(-\d+-of-\d+)?{re.escape(suffix)}")
    return sorted(file.name for file in folder.glob("model*") if name.fullmatch(file.name))


def read_index(path: Path) -> dict[str, str]:
    """The map from tensor to file name of an index; ValueError if it is none."""
    try:
        where = json.loads(path.read_bytes())["weight_map"]
        # A name with a folder in it would let an index reach out of its checkpoint.
        if not all(isinstance(file, str) and file == Path(file).name for file in where.values()):
            raise ValueError("a shard is not named by a plain file name")
        return dict(where)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of shards ({error!r}); copy or download it again") from error


def storable(name: str, tensor: Tensor) -> Tensor:
    """The tensor as safetensors takes it: in main memory, contiguous, without pending conjugation.

    Raises:
        ValueError: if safetensors stores no tensors of its kind; the message has the name.
    """
    if tensor.layout != torch.strided or tensor.dtype not in NAMES or tensor.is_meta:
        raise ValueError(f"'{name}': safetensors stores no {tensor.dtype} {tensor.layout} tensor on {tensor.device}")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


class ShardWriter:
    """Writes tensors one after another into shards; holds one shard in memory.

    Shards have temporary names until all are written, and the index comes last: what is interrupted leaves nothing
    that could be taken for a checkpoint. Use it as a context manager; leaving it finishes, an exception cleans up.

    Args:
        folder: where to write; it is made if it is not there.
        suffix: of the files.
        max_shard_size: bytes a shard, as `parse_size` reads them; a larger tensor has a shard of its own.
        metadata: the safetensors metadata of a shard, from the notes of what is in it.

    Raises:
        FileExistsError: if the folder has weights with this suffix.
    """

    def __init__(
        self,
        folder: Path,
        suffix: str,
        max_shard_size: int | str,
        metadata: Callable[[dict[str, Any]], dict[str, str]],
    ) -> None:
        self.folder, self.suffix, self.metadata = folder, suffix, metadata
        self.limit = parse_size(max_shard_size)
        folder.mkdir(parents=True, exist_ok=True)
        if there := _files(folder, suffix):
            raise FileExistsError(f"{folder}: has weights already ({there[0]}); name a new folder")
        self.written: list[Path] = []
        self.finished: list[Path] = []
        self.where: dict[str, int] = {}  # tensor -> number of its shard
        self.total = 0
        self._clear()

    def _clear(self) -> None:
        self.parts: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {}
        self.storages: set[int] = set()
        self.bytes = 0

    def put(self, name: str, parts: dict[str, Tensor], note: Any = None) -> None:
        """Add a tensor as `parts`, its entries in the file, which stay together; `note` goes to `metadata`.

        Raises:
            ValueError: if the name was put before, or a part is of a kind that safetensors does not store.
            OSError: if a shard cannot be written (the disk is full).
        """
        if name in self.where:
            raise ValueError(f"{self.folder}: two tensors are named {name!r}")
        size = sum(part.numel() * part.element_size() for part in parts.values())
        # Two entries of one name (a tensor called like another's bitmask) cannot be in one file, but in two.
        if self.notes and (self.bytes + size > self.limit or self.parts.keys() & parts.keys()):
            self._write()
        self.where[name] = len(self.written)
        self.notes[name] = note
        self.bytes += size
        self.total += size
        for key, part in parts.items():
            part = storable(name, part)
            # safetensors refuses entries that share memory, even a part of it.
            storage = part.untyped_storage().data_ptr()
            self.parts[key] = part.clone() if storage in self.storages else part
            self.storages.add(storage)

    def _write(self) -> None:
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".model.", suffix=self.suffix)
        os.close(handle)
        partial = Path(name)
        self.written.append(partial)
        try:
            save_file(self.parts, partial, self.metadata(self.notes))
        except (SafetensorError, OSError) as error:
            found = system_error(error)
            raise OSError(found.errno or errno.EIO, found.strerror or str(found), str(self.folder)) from error
        partial.chmod(0o644)  # mkstemp makes private files; these are ordinary ones
        self._clear()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            kind = True
            raise
        finally:
            if kind is not None:
                for file in self.written + self.finished:
                    file.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self.notes or not self.written:
            self._write()
        total = len(self.written)
        numbers = [f"-{i:05}-of-{total:05}" if total > 1 else "" for i in range(1, total + 1)]
        self.finished = [self.folder / f"model{number}{self.suffix}" for number in numbers]
        for partial, final in zip(self.written, self.finished, strict=True):
            partial.replace(final)
        if total > 1:
            where = {name: self.finished[i].name for name, i in sorted(self.where.items())}
            with replace_file(self.folder / f"model{self.suffix}.index.json") as partial:
                index = {"metadata": {"total_size": self.total}, "weight_map": where}
                partial.write_text(json.dumps(index, indent=1) + "\n")
