"""The activation cache: what a frozen model computes is written once, then the rest trains on that.

    samples --> frozen model --> leaves (`frozen.py`) --> shards on disk     (once, for each view)
    numbers --> shards (memory-mapped) --> the rest of the model --> loss    (every training step)

A cache may be larger than memory: a batch first asks for just the rows that it will read (`storage/mapped.py`).
Random choices in the preparation of inputs are fixed in a view; several views are cached and taken in turn. Shards are
written whole or not at all, so that an interrupted fill goes on where it stopped, and several processes may fill one
folder: each begins with shards of its own, and writes what is then still missing. A folder belongs to what its
`key.json` says; anything else is refused. Nothing here knows a backbone or a task.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trimtab.files import replace_file
from trimtab.progress import progress
from trimtab.storage.mapped import Mapped

Precision = Literal["fp32", "fp16", "int8"]
SHARD_ROWS = 512
FORMAT = 2
_SIZE = {"fp32": 4, "fp16": 2, "int8": 1}


class Column(NamedTuple):
    """What is stored of a sample under one name.

    Attributes:
        shape: of one sample.
        dtype: as it is computed.
        packed: whether it is stored in the cache's precision; vectors, masks and numbers stay as they are.
        drawn: whether it differs between views; else it stands in the shards of the first alone.
        axis: at whose end the text is, of one sample's axes; None if no axis can be cut.
        before: how much is on that axis before the text.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    packed: bool = False
    drawn: bool = True
    axis: int | None = None
    before: int = 0

    def bytes(self, precision: Precision) -> int:
        """On disk, of one sample; the few scales that all samples of a shard share are left out."""
        size = self.dtype.itemsize
        size = min(size, _SIZE[precision]) if self.packed else size
        scales = self.shape[0] * 4 if self.packed and precision == "int8" and len(self.shape) == 3 else 0
        return int(torch.Size(self.shape).numel()) * size + scales


class ActivationCache:
    """Cached activations of rows in several views.

    Args:
        folder: where shards are, or will be.
        key: everything that the contents depend on, as plain JSON.
        rows: how many there are.
        views: how many times each is kept.
        columns: what is stored, by name.
        compute: view, first and last row (beyond the last) -> one shard's tensors, whose first axis is the row.
        precision: of packed columns; `int8` has a scale a channel and shard, of grids a channel and sample.

    Raises:
        ValueError: if the folder holds another cache, with the difference, or shards without their key.
    """

    def __init__(self, folder: Path, key: dict[str, Any], rows: int, views: int, columns: Mapping[str, Column],
                 compute: Callable[[int, int, int], dict[str, Tensor]], precision: Precision = "fp16"):  # fmt: skip
        self.folder, self.rows, self.views = Path(folder), rows, views
        self.key = {"format": FORMAT, **key}
        self.columns, self.compute, self.precision = dict(columns), compute, precision
        self._check_key()
        self.shards: list[Mapped] = []

    def __len__(self) -> int:
        return self.rows

    def _check_key(self) -> None:
        """ValueError if the folder has shards that may be of something else."""
        file, way_out = self.folder / "key.json", "delete the folder, or name another"
        there = len(list(self.folder.glob("view-*.safetensors")))  # the key is written before them
        if not file.is_file():
            if there:
                raise ValueError(f"{self.folder}: {there} shards of a cache without its key.json, which says what they "
                                 f"are: {way_out}")  # fmt: skip
            return
        try:
            found = dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: not the key of a cache ({error}): {way_out}") from error
        if found.get("format") != FORMAT:
            raise ValueError(
                f"{file}: a cache of format {found.get('format', 1)}, this version reads and writes {FORMAT}: {way_out}"
            )
        for name, value in self.key.items():
            if found.get(name) != value:
                raise ValueError(f"{file}: a cache of another {name}: {_shown(found.get(name), value)}; {way_out}")

    def _shard(self, view: int, start: int) -> Path:
        return self.folder / f"view-{view}-row-{start:08d}.safetensors"

    def _starts(self) -> list[tuple[int, int]]:
        return [(v, s) for v in range(self.views) for s in range(0, self.rows, SHARD_ROWS)]

    def bytes_of(self, view: int) -> int:
        """On disk, of one row in a view."""
        return sum(c.bytes(self.precision) for c in self.columns.values() if c.drawn or not view)

    @property
    def bytes_a_sample(self) -> float:
        """Bytes on disk, by samples of all views."""
        return sum(self.bytes_of(v) for v in range(self.views)) / self.views

    def told(self) -> str:
        """What it takes on disk, in words."""
        whole = self.rows * sum(self.bytes_of(v) for v in range(self.views))
        missing = self._missing()
        left = f", {_size(missing)} of it to be written" if 0 < missing < whole else "" if missing else ", all there"
        return (f"{_size(whole)} for {self.rows} rows in {self.views} {'view' if self.views == 1 else 'views'} "
                f"({self.precision}){left}, in {self.folder}")  # fmt: skip

    def _missing(self) -> int:
        """Bytes that are still to be written."""
        return sum(self.bytes_of(v) * (min(s + SHARD_ROWS, self.rows) - s) for v, s in self._starts()
                   if not self._shard(v, s).is_file())  # fmt: skip

    @torch.no_grad()
    def fill(self) -> int:
        """Write the shards that are not there, and open all; returns how many were written.

        Raises:
            OSError: if the disk has too little space, before anything is written, or if it fills up; what has been
                written stays usable.
            ValueError: if a value is too large for the precision, a shard is damaged, or another process has made the
                folder another cache's.
        """
        self._check_key()  # another process may have written it since
        self._sweep()
        self._check_space()
        file = self.folder / "key.json"
        if not file.is_file():
            with replace_file(file) as partial:
                partial.write_text(json.dumps(self.key, indent=1) + "\n")
        starts, written = self._starts(), 0
        world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
        with progress("cache", len(starts), "shard") as job:
            for view, start in sorted(starts, key=lambda s: (starts.index(s) % world != rank, *s)):
                if not self._shard(view, start).is_file():
                    self._write(view, start)
                    written += 1
                job.add()
        self.shards = [self._opened(self._shard(v, s)) for v, s in starts]
        return written

    def _sweep(self) -> None:
        """Delete what killed processes have left half written: a shard is written in far less than an hour."""
        for file in self.folder.glob(".view-*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > 3600:
                    file.unlink()

    def _check_space(self) -> None:
        missing = self._missing()
        there = next(p for p in (self.folder, *self.folder.parents) if p.is_dir())
        free = shutil.disk_usage(there).free
        if missing > free:
            raise OSError(
                f"cache: needs {_size(missing)} more in {self.folder}, where {_size(free)} are free: set "
                "`training.cache` to int8, lower `training.cache_views`, read fewer layers, or let $TRIMTAB_CACHE name "
                "a folder on a larger disk"
            )

    def _write(self, view: int, start: int) -> None:
        packed: dict[str, Tensor] = {}
        found = self.compute(view, start, min(start + SHARD_ROWS, self.rows))
        for name, value in found.items():
            one = self.columns[name]
            packed |= pack(name, value, self.precision) if one.packed else {name: value.contiguous()}
        file = self._shard(view, start)
        try:
            with replace_file(file) as partial:
                save_file(packed, partial)
        except (OSError, SafetensorError) as error:
            there = len(list(self.folder.glob("view-*.safetensors")))
            raise OSError(f"{file}: not written ({error}). The {there} shards that are there stay usable: free "
                          f"{_size(self._missing())} on that disk and start again") from error  # fmt: skip

    def _opened(self, file: Path) -> Mapped:
        try:
            return Mapped(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: damaged ({error}): delete it, it is written again") from error

    def batch(self, indices: Sequence[int], length: int | None = None) -> dict[str, Tensor]:
        """Cached samples by number, view after view: 0 .. views * rows - 1. The first axis is the sample.

        With `length` axes of the text are cut to it.
        """
        per_view = -(-self.rows // SHARD_ROWS)
        places: dict[int, tuple[list[int], list[int]]] = {}  # shard -> rows in it, places in the batch
        for order, index in enumerate(indices):
            view, row = divmod(int(index), self.rows)
            rows, orders = places.setdefault(view * per_view + row // SHARD_ROWS, ([], []))
            rows.append(row % SHARD_ROWS)
            orders.append(order)
        for shard, (rows, _) in places.items():
            self._ask_for(shard, rows, length)
        out: dict[str, Tensor] = {}
        for name, one in self.columns.items():
            found = {s if one.drawn else s % per_view: s for s in places}
            if len(places) == 1:
                (shard,) = found
                out[name] = unpack(self.shards[shard].tensors, name, torch.tensor(places[found[shard]][0]), one, length)
                continue
            for shard in places:
                rows, orders = places[shard]
                from_ = self.shards[shard if one.drawn else shard % per_view].tensors
                part = unpack(from_, name, torch.tensor(rows), one, length)
                if name not in out:
                    out[name] = part.new_empty(len(indices), *part.shape[1:])
                out[name][torch.tensor(orders)] = part
        return out

    def _ask_for(self, shard: int, rows: Sequence[int], length: int | None) -> None:
        """Let the system read rows of a shard, and of the first view's what is the same in all views."""
        wanted: dict[int, list[Tensor]] = {}
        for name, one in self.columns.items():
            at = shard if one.drawn else shard % -(-self.rows // SHARD_ROWS)
            found = [self.shards[at].tensors.get(n) for n in (name, f"{name}.scale")]
            wanted.setdefault(at, []).extend(cut(t, one, length) for t in found if t is not None and len(t) > 1)
        for at, values in wanted.items():
            self.shards[at].ask_for(values, rows)


def _shown(found: Any, wanted: Any) -> str:
    """What differs, shortly; of dicts the first entry that does."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        name = next(k for k in [*wanted, *found] if found.get(k) != wanted.get(k))
        return f"{name}: {_shown(found.get(name), wanted.get(name))}"
    return f"{str(found)[:80]}, needed is {str(wanted)[:80]}"


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def pack(name: str, maps: Tensor, precision: Precision) -> dict[str, Tensor]:
    """Hidden maps (B, L, D) or (B, C, H, W) as they are stored; `int8` with a scale for each channel of the shard, of
    grids for each channel of a sample. What is bfloat16 stays so, unless it is to be int8."""
    if not bool(maps.isfinite().all()):
        raise ValueError(f"cache: the frozen model gives {name} with values that are not finite")
    if precision != "int8":
        half = maps.dtype == torch.bfloat16
        narrow = maps.dtype if half else torch.float16 if precision == "fp16" else torch.float32
        stored = maps.to(narrow).contiguous()
        if not bool(stored.isfinite().all()):
            largest = float(maps.abs().max())
            raise ValueError(f"cache: {name} has values up to {largest:g}, too large for {precision}: use int8 or fp32")
        return {name: stored}
    others = [0, 1] if maps.ndim == 3 else list(range(2, maps.ndim))
    scale = maps.float().abs().amax(dim=others, keepdim=True).clamp(min=1e-12) / 127
    return {name: (maps / scale).round().to(torch.int8).contiguous(), f"{name}.scale": scale}


def unpack(shard: Mapping[str, Tensor], name: str, rows: Tensor, one: Column, length: int | None = None) -> Tensor:
    """Rows of a column; maps in int8 become float32."""
    value = cut(shard[name], one, length).index_select(0, rows)
    if (scale := shard.get(f"{name}.scale")) is None:
        return value
    return value * (scale if len(scale) == 1 else cut(scale, one, length)[rows])


def cut(value: Tensor, one: Column, length: int | None) -> Tensor:
    """A column's rows with texts of at most `length` tokens."""
    axis = None if one.axis is None or length is None else one.axis + 1
    end = one.before + (length or 0)
    return value if axis is None or value.shape[axis] <= end else value.narrow(axis, 0, end)
